"""Remote code of 2024, DeepSeek-MoE-16B's look-alike: it loads, runs, and is compressed whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import open_source
from mctk.engine import run
from mctk.errors import UserError
from mctk.models import bank_sites, find_layers, gradients_enabled, read_banks
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.runtime import observe, observe_forwards, observe_gradients, restore_buffers
from mctk.runtime.remote import MASKS, causal_mask, causal_mask_for_sdpa, old_names, padding_mask
from mctk.statistics import (
    ChannelEnergy,
    ExpertFrequency,
    RouterWeight,
    SecondMoment,
)
from mctk.statistics.collect import LayerCollector
from mctk.sweep import StreamedModel, stream_logits
from torch import nn
from transformers import AutoModelForCausalLM

from tests.families import save_remote, token_ids
from tests.tiny_run import DEMO

PARTS = ("gate", "up", "down")


def load(path: Path, **options: object) -> nn.Module:
    """By `from_pretrained`, with the buffers that it leaves undefined."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options).eval()
    restore_buffers(model)
    return model


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(open_source(str(path)), trust_remote_code=True)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model(ids, **options).logits


def test_without_trust_nothing_runs(remote):
    with pytest.raises(UserError, match="needs code that its directory carries; read that code"):
        StreamedModel(open_source(str(remote)))


def test_the_code_does_not_load_without_the_old_names(remote):
    """Else the look-alike would prove nothing."""
    code = (remote / "modeling_deepseek.py").read_text()
    import transformers.utils.import_utils as utilities

    assert f"from {MASKS} import" in code and "import is_torch_fx_available" in code
    assert not hasattr(utilities, "is_torch_fx_available")
    with pytest.raises(ModuleNotFoundError):
        __import__(MASKS)


def test_nothing_stays_behind(remote):
    import transformers.cache_utils as caches
    import transformers.utils.import_utils as utilities

    before = caches.DynamicCache
    streamed(remote)
    assert MASKS not in sys.modules
    assert not hasattr(utilities, "is_torch_fx_available")
    assert caches.DynamicCache is before and not hasattr(before, "from_legacy_cache")
    with pytest.raises(RuntimeError, match="stop"), old_names():
        assert hasattr(utilities, "is_torch_fx_available") and MASKS in sys.modules
        raise RuntimeError("stop")
    assert MASKS not in sys.modules and caches.DynamicCache is before


def test_other_import_errors_are_the_users(tmp_path):
    path = save_remote(tmp_path / "broken")
    file = path / "modeling_deepseek.py"
    file.write_text("import math\nfrom math import no_such_name\n" + file.read_text())
    with pytest.raises(UserError, match="no_such_name"):
        streamed(path)


def test_streaming_is_the_models_own_forward(remote):
    ids = token_ids()
    expected = logits(load(remote), ids, use_cache=False)
    found = torch.cat(list(stream_logits(streamed(remote), ids)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scaled_rotary_embeddings_keep_their_old_form(tmp_path):
    scaling = {"type": "linear", "factor": 4.0}
    path = save_remote(tmp_path / "scaled", rope_scaling=scaling)
    model = streamed(path)
    assert model.config.rope_scaling["type"] == "linear"
    assert model.layers[0].self_attn.rotary_emb.scaling_factor == 4.0
    ids = token_ids()
    plain = logits(load(save_remote(tmp_path / "plain")), ids)
    found = torch.cat(list(stream_logits(model, ids)))
    torch.testing.assert_close(found, logits(load(path), ids), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_buffers_that_no_checkpoint_holds_are_computed_again(remote):
    model = load(remote)
    ids = token_ids()
    expected = logits(model, ids)
    for layer in find_layers(model)[1]:
        layer.self_attn.rotary_emb.inv_freq.fill_(7.0)
        layer.self_attn.rotary_emb.max_seq_len_cached = None
    assert not torch.allclose(logits(model, ids), expected, atol=1e-2)
    restore_buffers(model)
    for layer in find_layers(model)[1]:
        layer.self_attn.rotary_emb.max_seq_len_cached = None
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_caches_and_padding(remote, attention):
    """Attention by the old helpers: a prefix's cache and padding change nothing."""
    model = load(remote, attn_implementation=attention)
    ids = token_ids()
    expected = logits(model, ids, use_cache=False)
    with torch.no_grad():
        first = model(ids[:, :9])
        second = model(ids[:, 9:], past_key_values=first.past_key_values)
    assert isinstance(first.past_key_values, tuple)
    found = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    seen = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], dim=1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=seen, position_ids=positions)[:, 3:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_by_value():
    states = torch.zeros(1, 3, 8, dtype=torch.float16)
    least = torch.finfo(torch.float16).min
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), (1, 3), states, 1)
    assert mask.dtype == torch.float16 and mask.shape == (1, 1, 3, 4)
    seen = [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert torch.equal(mask[0, 0] == 0, torch.tensor(seen, dtype=torch.bool))
    assert set(mask.unique().tolist()) == {least, 0.0}
    window = causal_mask(None, (1, 3), states, 0, sliding_window=2)
    seen = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert torch.equal(window[0, 0] == 0, torch.tensor(seen, dtype=torch.bool))
    assert causal_mask_for_sdpa(torch.ones(1, 3), (1, 3), states) is None
    blind = causal_mask_for_sdpa(torch.tensor([[0, 1, 1]]), (1, 3), states)
    assert blind is not None and not blind[0, 0, 0].any()  # a row of padding: NaN else
    assert causal_mask_for_sdpa(None, (1, 3), states, 2) is not None
    flat = padding_mask(torch.tensor([[1, 0]]), torch.float32, 3)
    assert flat.shape == (1, 1, 3, 2) and (flat[0, 0, :, 1] < -1e30).all()


def reference_squares(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Squared gradients by the code's own training mode, with the auxiliary loss taken out."""
    code = sys.modules[type(model).__module__]

    class Nothing:
        @staticmethod
        def apply(y: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
            assert loss.requires_grad
            return y

    model.requires_grad_(True).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "AddAuxiliaryLoss", Nothing)
        model(ids, labels=ids, use_cache=False).loss.backward()
    squares = {name: p.grad.square() for name, p in model.named_parameters() if p.grad is not None}
    model.requires_grad_(False).eval()
    model.zero_grad()
    return squares


def test_fisher_is_that_of_a_full_backward(remote):
    model = load(remote)
    ids = token_ids(1, 33)
    expected = reference_squares(model, ids)
    layers = find_layers(model)[1]
    found: dict[str, torch.Tensor] = {}

    def listen(layer: int):
        def observer(name, expert, token, x, grad):
            matrix = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
            assert matrix not in found and not token.any()
            found[matrix] = (grad.T @ x).square()

        return observer

    blocks = [layer for layer in layers if "experts.down" in bank_sites(layer)]
    assert len(blocks) == 2
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    with (
        gradients_enabled(model),
        observe_gradients(layers[1].mlp.experts, listen(1)),
        observe_gradients(layers[2].mlp.experts, listen(2)),
    ):
        model(ids, labels=ids, use_cache=False).loss.backward()
    met = {name for name, value in expected.items() if ".experts." in name and value.any()}
    assert met <= set(found) and len(met) > 30
    for name in met:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name
    below = embeddings.grad.square()
    error = (below - expected["model.embed_tokens.weight"]).norm() / below.norm()
    assert error < 1e-5


def test_without_the_context_gradients_do_not_reach_the_experts(remote):
    """What `gradients_enabled` is for, and that it leaves nothing behind."""
    layer = find_layers(load(remote))[1][1]
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        expected = layer.mlp(x)
    with gradients_enabled(layer):
        assert "moe_infer" in vars(layer.mlp)
        found = layer.mlp(x)
    assert torch.equal(found, expected)
    assert "moe_infer" not in vars(layer.mlp)
    (whole,) = torch.autograd.grad(found.sum(), x)
    (lacking,) = torch.autograd.grad(layer.mlp(x).sum(), x)
    assert not torch.allclose(whole, lacking, atol=1e-3)


def test_gradients_take_one_sequence_at_a_time(remote):
    layer = find_layers(load(remote))[1][1]
    bank_sites(layer)
    with (
        observe_gradients(layer.mlp.experts, lambda *_: None),
        pytest.raises(ValueError, match=r"one sequence \[1, T, H\] at a time"),
    ):
        layer.mlp(torch.randn(2, 5, 32))


def test_statistics_are_those_of_the_routing(remote):
    """Rows, slots and weights of each expert, though the block routes by itself."""
    layer = find_layers(load(remote))[1][1]
    sites, banks = bank_sites(layer), read_banks(layer, 1)
    ids = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    ids[1, 0] = ids[0, 0]  # two equal rows: they may swap places and nothing changes
    hidden = ids.view(-1, 32)
    index, weights, _ = layer.mlp.gate(ids)
    seen = {}
    counted = []

    def observer(expert, token, slot, x, h, y, weight):
        seen[expert] = token
        assert torch.equal(token, token.sort().values)
        assert torch.equal(index[token, slot], torch.full_like(token, expert))
        assert torch.equal(x, hidden[token]) and torch.equal(weight, weights[token, slot])
        gate, up, down = (banks[f"experts.{part}"].materialise(expert)[0] for part in PARTS)
        assert torch.allclose(h, torch.nn.functional.silu(x @ gate.T) * (x @ up.T), atol=1e-6)
        assert torch.allclose(y, h @ down.T, atol=1e-6)

    experts = layer.mlp.experts
    counts = torch.bincount(index.flatten(), minlength=8)
    with torch.no_grad():
        with (
            observe(experts, observer),
            observe_forwards(experts, lambda *n: counted.append(n)),
        ):
            layer.mlp(ids)
        assert counted == [(18, 54)]
        assert {e: len(t) for e, t in seen.items()} == {
            e: n for e, n in enumerate(counts.tolist()) if n
        }
        needs = [ExpertFrequency(), RouterWeight(), SecondMoment("experts.down")]
        needs.append(ChannelEnergy("experts.down"))
        collector = LayerCollector(layer, 1, sites, banks, needs, torch.device("cpu"))
        with collector.listening():
            layer.mlp(ids)
    found = collector.result()
    assert torch.equal(found[ExpertFrequency()], counts)
    total = torch.zeros(8).index_add_(0, index.flatten(), weights.flatten())
    torch.testing.assert_close(found[RouterWeight()].float(), total)
    energy = found[SecondMoment("experts.down")].value.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found[ChannelEnergy("experts.down")], energy, rtol=1e-4, atol=1e-6)


FRESH = """
import sys
import mctk
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
path, ids = sys.argv[1], torch.load(sys.argv[2])
model, info = AutoModelForCausalLM.from_pretrained(
    path, trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
assert [m for m in model.modules() if type(m).__name__ == "TermExpertList"]
torch.save(model.eval()(ids).logits.detach(), sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


WHITENED = [
    {
        "decompose": "svd_llm",
        "targets": ["experts.*", "shared_expert.*"],
        "options": {"rank_multiple": 1, "storage": "pivoted"},
    }
]
BASE_AND_DELTAS = [
    {"merge": "fisher"},
    {"decompose": "delta_svd", "size": "auto", "options": {"rank_multiple": 1}},
    {
        "prune": "semi_dynamic",
        "options": {"static": 0.1, "dynamic": 0.1, "channel_multiple": 1},
    },
]


@pytest.mark.parametrize("steps", [WHITENED, BASE_AND_DELTAS], ids=["svd_llm", "d2moe"])
def test_compressed_whole_and_loaded_in_a_fresh_process(tmp_path, write_recipe, cache, steps):
    model = save_remote(tmp_path / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    path = write_recipe(
        model=str(model),
        trust_remote_code=True,
        steps=steps,
        calibration={
            "text": str(DEMO / "text" / "calibration" / "*.jsonl"),
            "sequences": 6,
            "length": 64,
            "batch": 1,  # gradients of a list of experts take one sequence at a time
        },
        budget={"remove": 0.4, "of": "targets"},
        gate=True,
    )
    registry = load_plugins()
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["gate"]["streamed_equal"] is True
    assert metrics["gate"]["fresh_process_equal"] is True
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    output, ids = tmp_path / "out", token_ids()
    # Channels that are skipped are chosen by the tokens of a batch: the same batch here and there.
    [expected] = stream_logits(streamed(output), ids, batch_size=len(ids))
    torch.save(ids, tmp_path / "ids.pt")
    again = tmp_path / "again"

    def fresh(directory: Path) -> torch.Tensor:
        command = [sys.executable, "-c", FRESH, str(directory), str(tmp_path / "ids.pt")]
        command += [str(tmp_path / "logits.pt"), str(again)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(tmp_path / "logits.pt")

    torch.testing.assert_close(fresh(output), expected, rtol=1e-5, atol=1e-5)
    for file in output.glob("*.py"):
        shutil.copy(file, again)
    shutil.copytree(again, tmp_path / "saved")
    torch.testing.assert_close(fresh(tmp_path / "saved"), expected, rtol=1e-5, atol=1e-5)
