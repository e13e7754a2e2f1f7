"""D²-MoE through whole runs: exact at full rank, resumed, shared by runs, its policy on and off."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.errors import UserError
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.runtime import dynamic_pruning
from mctk.sweep import StreamedModel, stream_logits

from tests.engine.conftest import DEMO, TEXT
from tests.engine.test_resume import start, weights

FISHER = {"merge": "fisher"}
DELTA = {"decompose": "delta_svd", "options": {"rank_multiple": 1, "storage": "pivoted"}}
STATIC = {"prune": "semi_dynamic", "options": {"static": 0.1, "channel_multiple": 1}}
STEPS = [FISHER, DELTA, STATIC]


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def logits(path: Path) -> torch.Tensor:
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))
    return torch.cat(list(stream_logits(StreamedModel(Source(path), dtype="float32"), ids)))


def sizes_of(path: Path, registry, number: int) -> dict[int, int]:
    plan = make_plan(load_recipe(path, registry=registry), registry)
    return {layer: size for (step, layer, _), size in plan.solve().items() if step == number}


@pytest.mark.parametrize("options", [{}, {"bases": 2, "align": True}])
def test_full_rank_and_nothing_pruned_is_the_identity(
    write_recipe, registry, cache, mixtral, tmp_path, options
):
    path = write_recipe(
        dtype="float32",
        storage_dtype="float32",
        budget=None,
        steps=[{**FISHER, "options": options}, {**DELTA, "size": {"rank": 48}}],
    )
    run([load_recipe(path, registry=registry)], registry, cache=cache)
    exact, ours = logits(mixtral), logits(tmp_path / "out")
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


def test_plan_files_and_budget_agree_and_merging_is_exact(write_recipe, registry, cache, tmp_path):
    path = write_recipe(steps=STEPS, gate=True)
    metrics = run([load_recipe(path, registry=registry)], registry, cache=cache)[0]
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["budget"]["attained"] <= metrics["budget"]["allowed"]
    assert metrics["budget"]["shortfall_fraction"] <= 0.005
    assert metrics["gate"]["streamed_equal"] and metrics["gate"]["fresh_process_equal"]
    assert metrics["statistics"]["backward_sweeps"] == 1
    for layer in metrics["layers"]:
        errors = {row["step"]: row["layer_error"] for row in layer["trace"]}
        assert errors["merge/fisher"] < 1e-4 < errors["decompose/delta_svd"]
        assert errors["decompose/delta_svd"] < errors["prune/semi_dynamic"]
    state = tmp_path / "out" / ".mctk"
    assert not list(state.rglob("layer.*.safetensors")) and not list(state.glob("gradients*"))


def test_a_set_of_runs_goes_back_once_and_a_later_run_not_at_all(
    write_recipe, registry, cache, tmp_path
):
    def recipe(name: str, remove: float, merge: dict):
        path = write_recipe(
            name,
            steps=[merge, DELTA, STATIC],
            output=str(tmp_path / name),
            budget={"remove": remove, "of": "experts"},
        )
        return load_recipe(path, registry=registry)

    paper = {**FISHER, "options": {"frequency": False}}
    first = run([recipe("a", 0.4, FISHER), recipe("b", 0.4, paper)], registry, cache=cache)
    assert [m["statistics"]["backward_sweeps"] for m in first] == [1, 1]
    assert weights(tmp_path / "a") != weights(tmp_path / "b")
    (later,) = run([recipe("c", 0.6, FISHER)], registry, cache=cache)
    assert later["statistics"]["backward_sweeps"] == later["statistics"]["sweeps"] == 0


def test_where_the_disk_is_short_layers_are_computed_again(write_recipe, registry, tmp_path):
    for name, every in (("all", 1), ("few", 2)):
        path = write_recipe(steps=STEPS, output=str(tmp_path / name))
        recipe = load_recipe(path, overrides=[f"calibration.keep_every={every}"], registry=registry)
        run([recipe], registry, cache=tmp_path / f"cache-{name}")
    assert weights(tmp_path / "all") == weights(tmp_path / "few")


@pytest.mark.parametrize("options", [{"bases": "auto"}, {"bases": "auto", "align": True}])
def test_the_number_of_bases_can_be_left_to_the_data(
    write_recipe, registry, cache, tmp_path, options
):
    steps = [{**FISHER, "options": options}, DELTA, STATIC]
    path = write_recipe(steps=steps, allocate={"method": "by_loss"})
    plan = make_plan(load_recipe(path, registry=registry), registry)
    assert plan.pending and plan.allowed is not None
    (metrics,) = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["budget"]["attained"] <= metrics["budget"]["allowed"]
    assert metrics["budget"]["shortfall_fraction"] <= 0.005


def test_base_and_deltas_share_one_budget(write_recipe, registry, cache):
    """With both sizes left to the allocator, channels of the base are traded against ranks."""
    steps = [FISHER, DELTA, {**STATIC, "size": "auto"}]
    kept = {}
    for method in ("uniform", "by_loss"):
        path = write_recipe(method, steps=steps, allocate={"method": method})
        recipe = load_recipe(path, registry=registry, output=str(path.with_suffix("")))
        (metrics,) = run([recipe], registry, cache=cache)
        assert metrics["budget"]["attained"] <= metrics["budget"]["allowed"]
        assert metrics["budget"]["shortfall_fraction"] <= 0.005
        last = [layer["trace"][-1]["layer_error"] for layer in metrics["layers"]]
        kept[method] = sum(last)
    assert kept["by_loss"] < kept["uniform"]


def test_excluded_layers_and_banks_stay(write_recipe, registry, cache, tmp_path):
    steps = [{**step, "layers": "1-2"} for step in STEPS]
    path = write_recipe(steps=steps, budget={"remove": 0.2, "of": "experts"})
    (metrics,) = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert [bool(layer["trace"]) for layer in metrics["layers"]] == [False, True, True]
    config = (tmp_path / "out" / "config.json").read_text()
    assert "layers.0." not in config and "layers.1." in config


def test_the_policy_changes_logits_and_active_channels(write_recipe, registry, cache, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {"static": 0.1, "dynamic": 0.2, "channel_multiple": 1}
    path = write_recipe(steps=[FISHER, DELTA, {"prune": "semi_dynamic", "options": options}])
    (metrics,) = run([load_recipe(path, registry=registry)], registry, cache=cache)
    static = write_recipe("static", steps=STEPS, output=str(tmp_path / "static"))
    (without,) = run([load_recipe(static, registry=registry)], registry, cache=cache)
    # What is only skipped is stored all the same: with the energies that choose, a little more.
    assert metrics["sizes"]["attained"]["parameters"] <= metrics["budget"]["allowed"] + (
        metrics["sizes"]["original"]["parameters"]
        - metrics["sizes"]["original"]["expert_parameters"]
    )
    active = [m["sizes"]["attained"]["active_parameters"] for m in (metrics, without)]
    assert active[0] < active[1]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(40)[None]
    experts = [m for m in model.modules() if hasattr(m, "active_channels")]
    assert len(experts) == 3
    with torch.no_grad():
        skipping = model(input_ids=ids, use_cache=False).logits
        with dynamic_pruning(model, enabled=False):
            whole = model(input_ids=ids, use_cache=False).logits
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(skipping, again)
    assert not torch.equal(skipping, whole)
    assert (skipping - whole).abs().max() < whole.abs().max()


def test_killed_in_the_backward_sweep_it_goes_on_there(write_recipe, tmp_path):
    recipe = write_recipe(steps=STEPS)
    code, commits = start(recipe, tmp_path / "cache0", tmp_path / "whole")
    assert code == 0
    expected = weights(tmp_path / "whole")
    # Forward sweep, head, then a prepared layer and its gradients for each layer, moments, layers.
    for number, share in enumerate((0.3, 0.45, 0.55)):
        fatal = round(share * commits)
        cache, output = tmp_path / f"cache-{number}", tmp_path / f"out-{number}"
        assert start(recipe, cache, output, fatal, after=bool(number % 2))[0] == -signal.SIGKILL
        code, again = start(recipe, cache, output)
        assert code == 0 and again < commits
        assert weights(output) == expected


def test_what_must_be_prepared_cannot_wait_for_the_budget(write_recipe, registry):
    steps = [{**DELTA, "decompose": "svd"}, FISHER, DELTA]
    with pytest.raises(UserError, match=r"auto is not possible here: .* Fisher"):
        make_plan(load_recipe(write_recipe(steps=steps), registry=registry), registry)
    steps = [{"prune": "semi_dynamic"}, {"decompose": "svd_llm"}]
    with pytest.raises(UserError, match="needs a merge before it"):
        make_plan(load_recipe(write_recipe(steps=steps), registry=registry), registry)


def test_the_papers_recipe_runs_on_the_demo_model(registry, cache, tmp_path):
    """Nothing is changed but model, output, text, and number and length of sequences."""
    text = str(TEXT / "calibration" / "*.jsonl")
    changes = [
        f"model={DEMO / 'model'}",
        f"output={tmp_path / 'out'}",
        f"calibration={{text: '{text}', sequences: 8, length: 64}}",
        f"evaluate.perplexity=[{{name: own, text: '{text}', length: 64, windows: 2}}]",
    ]
    path = DEMO.parent / "d2moe_mixtral.yaml"
    (metrics,) = run(
        [load_recipe(path, overrides=[*changes, "gate=false"], registry=registry)],
        registry,
        cache=cache,
    )
    assert metrics["budget"]["attained"] <= metrics["budget"]["allowed"]
    assert metrics["budget"]["shortfall_fraction"] <= 0.005
    assert metrics["evaluation"]["compressed"]["perplexity"]["own"]["perplexity"] > 1
    short = load_recipe(
        path, overrides=[*changes, "calibration.sequences=100000"], registry=registry
    )
    with pytest.raises(UserError, match="100000 are asked for"):
        describe(make_plan(short, registry))
