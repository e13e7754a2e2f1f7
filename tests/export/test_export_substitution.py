"""Expert substitutions, read back as vLLM's pull request 50415 describes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.errors import CheckpointError, UserError
from mctk.export import export
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel, stream_logits
from mctk.terms import Bias, Dense
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.families import tiny, token_ids
from tests.runtime.compression import compress, exact_terms
from tests.runtime.compression import write as write_compressed

REGISTRY = load_plugins()


@pytest.fixture
def mone(write_recipe, cache) -> Path:
    steps = [
        {"prune": "mone", "size": {"rank": 2}},
        {"decompose": "svd", "targets": "attention.q", "size": {"rank": 8}},
    ]
    recipe = load_recipe(write_recipe(budget=None, steps=steps), registry=REGISTRY)
    run([recipe], REGISTRY, cache=cache)
    return Path(recipe.output)


def read_back(directory: Path) -> PreTrainedModel:
    """A reader written from the format's description alone: whole experts and constants.

    Mixtral's files: `<target>.<expert>.w1|w3|w2.weight` of experts that stay, under their own
    numbers. A substituted expert's output is its value, weighted by the router as it was.
    """
    config = json.loads((directory / "config.json").read_text())
    schema = config.pop("compression_config")["transform_config"]["expert_substitution"]
    assert schema["version"] == 1
    assert schema["router_semantics"] == {
        "preserve_logical_expert_ids": True,
        "preserve_router_weights": True,
        "renormalize_after_substitution": False,
    }
    tensors = {}
    for file in Source(directory).files:
        tensors |= load_file(directory / file)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32
    ).eval()
    state = model.state_dict()
    constants = {}
    for path, target in schema["targets"].items():
        layer = path.split(".")[2]
        experts = f"model.layers.{layer}.mlp.experts"
        assert target["weight_layout"] == "compact_retained_experts"
        gone = {int(number) for number in target["replacements"]}
        for number in range(target["num_logical_experts"]):
            mine = [tensors.pop(f"{path}.{number}.w{i}.weight", None) for i in (1, 3, 2)]
            if number in gone:
                assert mine == [None] * 3
                continue
            state[f"{experts}.gate_up_proj"][number] = torch.cat(mine[:2]).float()
            state[f"{experts}.down_proj"][number] = mine[2].float()
        for number, entry in target["replacements"].items():
            assert entry["format"] == "constant-v1"
            constants[int(layer), int(number)] = tensors.pop(entry["tensors"]["value"]).float()
    for name, tensor in tensors.items():
        state[name.replace("block_sparse_moe", "mlp")].copy_(tensor)
    for number, layer in enumerate(model.model.layers):
        mine = {e: value for (at, e), value in constants.items() if at == number}

        def forward(x, index, weights, own=layer.mlp.experts.forward, mine=mine):
            substituted = torch.zeros_like(x)
            weights = weights.clone()
            for expert, value in mine.items():
                chosen = index == expert
                substituted += (weights * chosen).sum(-1, keepdim=True) * value
                weights[chosen] = 0
            return own(x, index, weights) + substituted

        layer.mlp.experts.forward = forward
    return model


def test_a_reader_of_the_layout_gives_the_compressed_models_logits(mone, tmp_path):
    result = export(mone, tmp_path / "export", constants=True, dtype=torch.float32)
    assert result.constants == 3 * 2 and result.difference is None
    ids = token_ids()
    with torch.no_grad():
        after = read_back(tmp_path / "export")(ids, use_cache=False).logits
    before = torch.cat(list(stream_logits(StreamedModel(Source(mone), dtype="float32"), ids)))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_what_is_left_is_the_originals(mone, mixtral, tmp_path):
    export(mone, tmp_path / "export", constants=True)
    before, after = Source(mixtral), Source(tmp_path / "export")
    new = set(after.tensors) - set(before.tensors)
    assert all(".block_sparse_moe.expert_replacements." in name for name in new)
    assert all(after.tensors[name].shape == (48,) for name in new)
    gone = set(before.tensors) - set(after.tensors)
    assert len(gone) == 3 * 2 * 3 and all(".experts." in name for name in gone)
    assert after.config["num_local_experts"] == 4
    assert "quant_method" not in after.config["compression_config"]
    card = (tmp_path / "export" / "README.md").read_text()
    assert "pull\n> request 50415" in card and ".from_pretrained" not in card


def test_transformers_does_not_take_it_for_a_whole_model(mone, tmp_path):
    """It must never run with random experts in the place of constants."""
    export(mone, tmp_path / "export", constants=True)
    with pytest.raises(RuntimeError, match=r"gate_up_proj|mismatch|size"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")


def constants_in(
    family: str,
    directory: Path,
    part: str = "down",
    of: int = 1,
    model: nn.Module | None = None,
    more: str | None = None,
) -> Path:
    """Writes a model whose last experts are constants, or whose gate has biases."""
    model = tiny(family) if model is None else model
    model.set_experts_implementation("mctk")
    [path, *_] = [name for name, m in model.named_modules() if hasattr(m, "is_transposed")]
    terms = exact_terms(model.get_submodule(path))
    for name, bank in terms.items():
        shape, weight = bank[0].shape, bank[0].weight
        stay = shape.members - of
        if part == "down":
            slots = [e if e < stay else None for e in range(shape.members)]
            bank[0] = Dense(shape, slots, weight[:stay])
        if name == part:
            where = [None if e < stay else e - stay for e in range(shape.members)]
            bank.append(Bias(shape, where, torch.ones(of, shape.out_features)))
    chosen = {path: terms}
    if more is not None:
        chosen[more] = exact_terms(model.get_submodule(more))
    write_compressed(model, compress(model, chosen), directory)
    return directory


def test_biases_that_the_original_has_stay(tmp_path):
    """Those of its attention, compressed or not."""
    model = tiny("qwen2_moe")
    model.set_experts_implementation("mctk")
    path = "model.layers.0.self_attn.q_proj"
    nn.init.constant_(model.get_submodule(path).bias, 0.5)
    directory = constants_in("qwen2_moe", tmp_path / "small", model=model, more=path)
    export(directory, tmp_path / "export", constants=True)
    tensors = {}
    for file in Source(tmp_path / "export").files:
        tensors |= load_file(tmp_path / "export" / file)
    assert torch.equal(tensors[f"{path}.bias"], torch.full_like(tensors[f"{path}.bias"], 0.5))
    constants = [name for name in tensors if "expert_replacements" in name]
    assert constants == ["model.layers.0.mlp.expert_replacements.3.value"]
    assert bool((tensors[constants[0]] == 1).all())


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    fused = constants_in("granitemoe", tmp_path / "fused")
    with pytest.raises(UserError, match=r"hold .*experts fused, and the layout of expert"):
        export(fused, tmp_path / "export", constants=True)
    gate = constants_in("mixtral", tmp_path / "gate", part="gate")
    with pytest.raises(UserError, match=r"experts.gate holds biases, and .* has no bias"):
        export(gate, tmp_path / "export", constants=True)
    every = constants_in("mixtral", tmp_path / "all", of=4)
    with pytest.raises(UserError, match="all experts are constants; one has to stay"):
        export(every, tmp_path / "export", constants=True)
    model = tiny("llama")
    path = "model.layers.0.self_attn.o_proj"
    described = compress(model, {path: exact_terms(model.get_submodule(path))})
    write_compressed(model, described, tmp_path / "llama")
    with pytest.raises(UserError, match=r"no expert is a constant.*export it with --dense"):
        export(tmp_path / "llama", tmp_path / "export", constants=True)
    assert not (tmp_path / "export").exists()


# The command


def test_the_command_prints_what_became_of_it(mctk, mone, tmp_path):
    code, out, err = mctk("export", mone, "--expert-substitution", "-o", tmp_path / "export")
    assert code == 0, err
    assert "expert-substitution" in out and "6 experts are constants" in out
    assert "Not run: no client that reads this layout is installed" in out
    assert "layers: 3/3" in err and "GB will be written, from" in err


def test_the_command_gives_json_and_says_the_difference(mctk, tmp_path):
    model = tiny("llama")
    path = "model.layers.0.self_attn.o_proj"
    described = compress(model, {path: exact_terms(model.get_submodule(path))})
    write_compressed(model, described, tmp_path / "small")
    arguments = ("export", tmp_path / "small", "--dense", "--dtype", "bfloat16")
    code, out, err = mctk(*arguments, "-o", tmp_path / "a", "--json", "--quiet")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["form"] == "dense" and found["modules"] == 1
    assert 0 < found["difference"]["median"] < found["difference"]["allowed"] < 0.1
    out = mctk(*arguments, "-o", tmp_path / "b", "--quiet")[1]
    assert f"{found['difference']['median']:.2g} (median token)" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --dense and --expert-substitution"),
        (["--dense", "--expert-substitution"], "one of --dense and --expert-substitution"),
        (["--dense"], "no directory "),
    ],
)
def test_the_commands_mistakes(mctk, tmp_path, flags, message):
    code, out, err = mctk("export", tmp_path / "none", *flags, "-o", tmp_path / "export")
    assert code == 2 and out == "" and message in err
    assert not (tmp_path / "export").exists()


def test_opened_again_it_is_called_what_it_is(mone, tmp_path):
    export(mone, tmp_path / "export", constants=True)
    with pytest.raises(CheckpointError, match=r"not quantised, but transformed \(expert_subst"):
        StreamedModel(Source(tmp_path / "export"))
