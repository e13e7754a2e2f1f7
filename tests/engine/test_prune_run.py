"""Expert pruning through recipes: who goes, what is written, and that others can load it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.data import calibration_windows
from mctk.engine import run
from mctk.errors import UserError
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.runtime import observe
from mctk.sweep import ForwardSweep, StreamedModel, stream_logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import save_remote, tiny, token_ids
from tests.native import plain_logits
from tests.tiny_run import DEMO

REGISTRY = load_plugins()
REMOVERS = ["random", "frequency", "router_weight", "ean", "reap"]


def go(paths: list[Path], cache: Path) -> list[dict]:
    return run([load_recipe(path, registry=REGISTRY) for path in paths], REGISTRY, cache=cache)


def kept(checkpoint: Path, model: Path, layers: list[int], name: str) -> list[list[int]]:
    """Which experts of the original a native checkpoint holds, layer by layer."""
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (model, checkpoint))
    found = []
    for layer in layers:
        whole, rest = (m.get_submodule(name.format(layer)).down_proj for m in (before, after))
        found.append([e for w in rest for e in range(len(whole)) if torch.equal(whole[e], w)])
    return found


def reap_by_hand(recipe: Path, model: Path) -> torch.Tensor:
    """Σ g ‖y‖ / tokens of each layer's experts [L, E], from the whole model."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.set_experts_implementation("mctk")
    checked = load_recipe(recipe, registry=REGISTRY)
    tokenizer = AutoTokenizer.from_pretrained(model)
    drawn = checked.calibration
    windows = calibration_windows(
        tokenizer, drawn.source, drawn.sequences, drawn.length, checked.seed
    )
    terms: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)

    def listener(layer):
        def tap(expert, token, slot, x, h, y, weights):
            terms[layer, expert].append(weights.double() * y.double().norm(dim=1))

        return tap

    with contextlib.ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(whole.model.layers):
            stack.enter_context(observe(layer.mlp.experts, listener(number)))
        for ids in windows.ids.split(4):
            whole(ids, use_cache=False)
    scores = torch.zeros(len(whole.model.layers), whole.config.num_local_experts)
    for (layer, expert), parts in terms.items():
        scores[layer, expert] = torch.cat(parts).mean()
    return scores


def test_reap_on_mixtral(mixtral, write_recipe, cache):
    path = write_recipe(
        budget={"remove": 0.25, "of": "experts"},
        steps=[{"prune": "reap", "size": "auto"}],
    )
    (metrics,) = go([path], cache)
    out = Path(load_recipe(path, registry=REGISTRY).output)
    assert metrics["output_kind"] == "native"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    config = json.loads((out / "config.json").read_text())
    assert config.pop("num_local_experts") == 3
    source = json.loads((mixtral / "config.json").read_text())
    assert source.pop("num_local_experts") == 4
    assert config == source
    scores = reap_by_hand(path, mixtral)
    stay = [sorted(row.argsort(descending=True)[:3].tolist()) for row in scores]
    assert kept(out, mixtral, [0, 1, 2], "model.layers.{}.mlp.experts") == stay


def test_all_methods_calibrate_once_and_differ(write_recipe, cache, tmp_path, monkeypatch):
    sweeps = []
    calibrated = ForwardSweep.run
    monkeypatch.setattr(
        ForwardSweep, "run", lambda self, *args: sweeps.append(1) or calibrated(self, *args)
    )
    paths = [
        write_recipe(
            name,
            output=str(tmp_path / name),
            budget=None,
            steps=[{"prune": name, "size": {"rank": 2}}],
        )
        for name in (*REMOVERS, "mone")
    ]
    every = go(paths, cache)
    assert [m["output_kind"] for m in every] == ["native"] * 5 + ["mctk"]
    assert len(sweeps) == 1
    ids = token_ids(2, 13)
    logits = []
    for path, metrics in zip(paths, every, strict=True):
        assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
        model = StreamedModel(Source(load_recipe(path, registry=REGISTRY).output), dtype="float32")
        logits.append(torch.cat(list(stream_logits(model, ids))))
    plain = plain_logits([tmp_path / name for name in REMOVERS], ids)
    for ours, theirs in zip(logits[:-1], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[-1], logits[-2], atol=1e-3)
    # MoNE keeps a vector for each of the two experts that go, and the router whole.
    sizes = [m["sizes"]["attained"]["parameters"] for m in every]
    assert len(set(sizes[:-1])) == 1
    assert sizes[-1] - sizes[0] == 3 * 2 * (48 + 48)


FAMILIES = {
    "qwen2_moe": ("model.layers.{}.mlp.experts", [0, 1], 3, "num_experts"),
    "olmoe": ("model.layers.{}.mlp.experts", [0, 1], 3, "num_experts"),
    "deepseek_v3": ("model.layers.{}.mlp.experts", [1, 2], 6, "n_routed_experts"),
    "gpt_oss": ("model.layers.{}.mlp.experts", [0, 1], 3, "num_local_experts"),
}


def save(family: str, model: Path) -> Path:
    if family == "remote":
        save_remote(model, vocab_size=4096)
    else:
        tiny(family, vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, model)
    return model


def test_families(write_recipe, cache, tmp_path):
    outputs = []
    for family, (name, layers, keep, key) in FAMILIES.items():
        model = save(family, tmp_path / "model" / family)
        outputs.append(tmp_path / family)
        recipe = write_recipe(
            family,
            model=str(model),
            output=str(outputs[-1]),
            budget=None,
            dtype="float32",
            steps=[{"prune": "reap", "size": {"rank": keep}}],
        )
        (metrics,) = go([recipe], cache)
        assert metrics["output_kind"] == "native", family
        assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
        assert json.loads((outputs[-1] / "config.json").read_text())[key] == keep
        found = kept(outputs[-1], model, layers, name)
        assert all(len(row) == keep for row in found), family
        if family == "deepseek_v3":
            assert all(sum(e < 4 for e in row) == 3 for row in found)
    ids = token_ids(2, 13)
    for output, logits in zip(outputs, plain_logits(outputs, ids), strict=True):
        ours = torch.cat(list(stream_logits(StreamedModel(Source(output), dtype="float32"), ids)))
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_scores_are_compared_where_a_router_chooses_groups_first(write_recipe, cache, tmp_path):
    recipe = write_recipe(
        model=str(save("deepseek_v3", tmp_path / "model")),
        budget={"remove": 0.25, "of": "experts"},
        allocate={"method": "by_score"},
        steps=[{"prune": "reap"}],
    )
    (metrics,) = go([recipe], cache)
    assert [len(layer["kept"]) for layer in metrics["layers"][1:]] == [6, 6]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "remote"])
def test_mone_keeps_its_constants_in_files(family, write_recipe, cache, tmp_path, modules_cache):
    recipe = write_recipe(
        model=str(save(family, tmp_path / "model")),
        trust_remote_code=family == "remote",
        budget={"remove": 0.4, "of": "experts"},
        allocate={"method": "uniform"},
        dtype="float32",
        gate=True,
        steps=[{"prune": "mone", "size": "auto"}],
    )
    (metrics,) = go([recipe], cache)
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["gate"]["streamed_equal"] and metrics["gate"]["fresh_process_equal"]


def test_reap_of_experts_in_a_list(write_recipe, cache, tmp_path, modules_cache):
    recipe = write_recipe(
        model=str(save("remote", tmp_path / "model")),
        trust_remote_code=True,
        budget=None,
        dtype="float32",
        steps=[{"prune": "reap", "size": {"rank": 5}}],
    )
    (metrics,) = go([recipe], cache)
    assert metrics["output_kind"] == "native"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]


def test_a_step_after_it(write_recipe, cache):
    path = write_recipe(
        budget={"remove": 0.5, "of": "experts"},
        steps=[
            {"prune": "reap", "size": {"rank": 3}},
            {"decompose": "svd_llm", "size": "auto", "options": {"rank_multiple": 1}},
        ],
    )
    (metrics,) = go([path], cache)
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]


def test_too_few_for_a_token_is_an_error_of_the_plan(write_recipe, cache):
    path = write_recipe(budget=None, steps=[{"prune": "reap", "size": {"rank": 1}}])
    with pytest.raises(UserError, match=r"1 experts in layer 0: a token uses 2"):
        go([path], cache)
    path = write_recipe(budget=None, steps=[{"prune": "reap", "size": {"rank": 5}}])
    with pytest.raises(UserError, match=r"steps.0.size: 5 is not a size here; there are 1, 2, 3"):
        go([path], cache)


def test_mone_over_all_layers_at_once(write_recipe, cache):
    path = write_recipe(
        budget={"remove": 0.3, "of": "experts"},
        allocate={"method": "by_score"},
        steps=[{"prune": "mone", "size": "auto"}],
    )
    (metrics,) = go([path], cache)
    sizes = metrics["sizes"]
    assert sizes["planned"] == sizes["attained"]
    # Of 12 experts 4 have to go; each leaves a vector.
    removed = sizes["original"]["parameters"] - sizes["attained"]["parameters"]
    assert removed == 4 * (3 * 48 * 80 - 48)


def test_a_plan_says_what_a_routers_groups_forbid(write_recipe, tmp_path):
    changes = {"model": str(save("deepseek_v3", tmp_path / "model")), "steps": [{"prune": "reap"}]}

    def planned(remove):
        path = write_recipe(budget={"remove": remove, "of": "experts"}, **changes)
        return describe(make_plan(load_recipe(path, registry=REGISTRY), REGISTRY))

    assert not any("coarse" in line for line in planned(0.25)["warnings"])
    [line] = [line for line in planned(0.3)["warnings"] if "coarse" in line]
    assert "as many experts of each of the router's 2 groups stay" in line
    with pytest.raises(UserError, match=r"at most 50\.0% of the experts .* 2 groups stay"):
        planned(0.9)
