"""A fresh process loads checkpoints in every way: `python fresh_load.py DIRECTORY`.

Prints a JSON object: check → "ok" or a traceback.
"""

import json
import sys
import traceback
from pathlib import Path

import mctk  # noqa: F401

assert not {"torch", "transformers"} & set(sys.modules), "import mctk must not import these"

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
import families  # noqa: E402

torch.set_num_threads(1)
IDS = families.token_ids()


def logits(model):
    """Logits, [B, T, vocabulary], from tensors copied out of the file's mapping.

    In a mapped file tensors lie at any offset, and matrix products round by the alignment.
    """
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.clone()
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.clone()
    with torch.no_grad():
        return model(IDS).logits


def load(directory, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def same_tensors(state, expected):
    assert set(state) == set(expected), set(state) ^ set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def check_load(directory):
    """Plain loading gives the tensors and the logits of the model that was saved."""
    expected = torch.load(directory / "expected.pt")
    model = load(directory)
    same_tensors(model.state_dict(), expected["tensors"])
    assert torch.equal(logits(model), expected["logits"])
    experts = [m for m in model.modules() if type(m).__name__ == "TermExperts"]
    linears = [m for m in model.modules() if type(m).__name__ == "TermLinear"]
    assert linears and (experts or directory.name == "llama")


def check_generate(directory):
    """Generation with a cache gives what the logits say."""
    model = load(directory)
    out = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, eos_token_id=-1
    )
    assert out.shape == (IDS.shape[0], IDS.shape[1] + 4)
    with torch.no_grad():
        following = model(out).logits.argmax(-1)
    assert torch.equal(following[:, IDS.shape[1] - 1 : -1], out[:, IDS.shape[1] :])


def check_again(directory):
    """A loaded model can be saved and loaded again, and stays guarded."""
    expected = torch.load(directory / "expected.pt")
    again = directory.parent / f"{directory.name}-again"
    model = load(directory)
    model.save_pretrained(again, max_shard_size="100KB")
    first = json.loads((directory / "config.json").read_text())
    second = json.loads((again / "config.json").read_text())
    for key in ("experts_implementation", "quantization_config"):
        assert second[key] == first[key], key
    reloaded = load(again)
    same_tensors(reloaded.state_dict(), expected["tensors"])
    assert torch.equal(logits(reloaded), expected["logits"])


def check_headless(directory):
    """`AutoModel` finds the modules although its paths lack the prefix."""
    expected = torch.load(directory / "expected.pt")["tensors"]
    model = AutoModel.from_pretrained(directory)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    same_tensors(state, {n: t for n, t in expected.items() if n.startswith("model.")})


def check_placed(directory, device_map):
    """A device map changes nothing."""
    expected = torch.load(directory / "expected.pt")
    assert torch.equal(logits(load(directory, device_map=device_map)), expected["logits"])


def check_offloaded(directory):
    """Layers on disk are read when they run; saving reads them too."""
    expected = torch.load(directory / "expected.pt")
    places = {f"model.{part}": "cpu" for part in ("embed_tokens", "rotary_emb", "norm")}
    places |= {"model.layers": "disk", "lm_head": "cpu"}
    folder = directory.parent / f"{directory.name}-offload"
    model = load(directory, device_map=places, offload_folder=folder)
    parameters = [p for n, p in model.named_parameters() if "terms_" in n]
    assert parameters and all(p.is_meta for p in parameters)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected["logits"], rtol=1e-5, atol=1e-5)
    again = directory.parent / f"{directory.name}-offloaded-again"
    model.save_pretrained(again)
    same_tensors(load(again).state_dict(), expected["tensors"])


def check_bfloat16(directory):
    """Weights are cast on loading, positions are not."""
    model = load(directory, dtype=torch.bfloat16)
    floats = {t.dtype for n, t in model.state_dict().items() if "terms_" in n}
    assert floats == {torch.bfloat16, torch.int32, torch.uint8}, floats
    assert torch.equal(logits(model), torch.load(directory / "bfloat16.pt"))


def check_other_implementation(directory):
    """Layers left alone may run by another experts implementation."""
    expected = torch.load(directory / "expected.pt")
    model = load(directory, experts_implementation="eager")
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(logits(model), expected["logits"], rtol=1e-5, atol=1e-5)
    again = directory.parent / f"{directory.name}-eager-again"
    model.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["experts_implementation"][:4] == "mctk"


found = {}


def run(check, directory, *arguments):
    name = " ".join([check.__name__.removeprefix("check_"), directory.name, *arguments])
    try:
        check(directory, *arguments)
        found[name] = "ok"
    except Exception:
        found[name] = traceback.format_exc()


ROOT = Path(sys.argv[1])
for family in [*families.FAMILIES, "llama"]:
    run(check_load, ROOT / family)
    run(check_again, ROOT / family)
for family in ("mixtral", "gpt_oss", "deepseek_v3", "llama"):
    for check in (check_generate, check_headless, check_offloaded, check_bfloat16):
        run(check, ROOT / family)
run(check_placed, ROOT / "gpt_oss", "cpu")
run(check_placed, ROOT / "deepseek_v3", "auto")
run(check_other_implementation, ROOT / "qwen3_moe")
print(json.dumps(found))
