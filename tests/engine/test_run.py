"""Whole runs: from shards to a checked checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source, read_header
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel, stream_logits

from tests.engine.conftest import TEXT, save_mixtral

FLOATING = {"BF16", "F32", "F16"}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def go(path: Path, registry, cache: Path, overrides: list[str] | None = None) -> dict:
    recipe = load_recipe(path, overrides=overrides or [], registry=registry)
    return run([recipe], registry, cache=cache)[0]


def payload(output: Path) -> tuple[int, int]:
    """Parameters and bytes in a directory's weight files."""
    infos = [info for file in output.glob("*.safetensors") for info in read_header(file).values()]
    return (
        sum(info.numel for info in infos if info.dtype in FLOATING),
        sum(info.nbytes for info in infos),
    )


def test_sizes_of_plan_terms_and_files_agree(write_recipe, registry, cache, tmp_path):
    metrics = go(write_recipe(gate=True), registry, cache)
    parameters, nbytes = payload(tmp_path / "out")
    for kind in ("planned", "attained"):
        assert metrics["sizes"][kind]["parameters"] == parameters
        assert metrics["sizes"][kind]["bytes"] == nbytes
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    # Within the budget, and below it by at most 0.5 % of the original.
    budget = metrics["budget"]
    assert budget["attained"] <= budget["allowed"]
    assert budget["shortfall_fraction"] <= 0.005
    assert metrics["gate"]["streamed_equal"] and metrics["gate"]["fresh_process_equal"]


@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("unit", ["parameters", "bytes"])
@pytest.mark.parametrize("of", ["model", "experts", "targets"])
def test_budgets_are_met_in_every_unit_and_scope(write_recipe, registry, cache, of, unit, storage):
    from mctk.planning import make_plan

    path = write_recipe(
        budget={"remove": 0.3, "of": of, "unit": unit},
        steps=[{"decompose": "svd", "options": {"rank_multiple": 1, "storage": storage}}],
    )
    plan = make_plan(load_recipe(path, registry=registry), registry)
    attained = plan.attained(plan.predict(plan.solve()).as_dict())
    assert attained <= plan.allowed == int(0.7 * plan.scope + 1e-6)
    assert attained >= plan.allowed - 0.005 * plan.scope


def test_full_ranks_in_float32_are_the_identity(write_recipe, registry, cache, mixtral, tmp_path):
    path = write_recipe(
        dtype="float32",
        storage_dtype="float32",
        budget=None,
        steps=[
            {"decompose": "svd_llm", "targets": "experts.*", "size": {"rank": 48}},
            {"decompose": "svd", "targets": "attention.q", "size": {"rank": 48}},
        ],
    )
    metrics = go(path, registry, cache)
    assert any("stores no less" in warning for warning in metrics["warnings"])
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))
    exact, ours = (
        torch.cat(list(stream_logits(StreamedModel(Source(p), dtype="float32"), ids)))
        for p in (mixtral, tmp_path / "out")
    )
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


def test_nothing_loads_the_model_whole(write_recipe, registry, cache, monkeypatch):
    from transformers import PreTrainedModel

    def refuse(*args, **kwargs):
        raise AssertionError("from_pretrained was called")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    metrics = go(
        write_recipe(gate=True), registry, cache
    )  # its gate's fresh process is another process
    assert metrics["gate"]["streamed_equal"]


def test_a_second_run_finds_all_statistics_in_the_cache(write_recipe, registry, cache, tmp_path):
    first = go(write_recipe(), registry, cache)
    second = go(write_recipe("other", output=str(tmp_path / "other")), registry, cache)
    assert first["statistics"]["sweeps"] == 1 and first["statistics"]["cache_misses"] > 0
    assert second["statistics"] == {
        "cache_hits": first["statistics"]["cache_misses"],
        "cache_misses": 0,
        "sweeps": 0,
        "backward_sweeps": 0,
    }
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_a_set_of_runs_gives_what_single_runs_give(write_recipe, registry, cache, tmp_path):
    paths = [
        write_recipe("a", output=str(tmp_path / "a")),
        write_recipe("b", output=str(tmp_path / "b"), budget={"remove": 0.6, "of": "experts"}),
    ]
    together = run([load_recipe(p, registry=registry) for p in paths], registry, cache=cache)
    alone = go(paths[1], registry, tmp_path / "cache2", [f"output={tmp_path / 'alone'}"])
    assert together[1]["sizes"] == alone["sizes"]
    for file in (tmp_path / "b").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


def test_without_calibration_a_data_free_method_runs(write_recipe, registry, cache):
    metrics = go(write_recipe(calibration=None, steps=[{"decompose": "svd"}]), registry, cache)
    assert metrics["calibration"] is None
    assert metrics["layers"][0]["banks"]["experts.gate"]["relative_weight_error"] > 0


def test_by_loss_spends_the_budget_where_it_helps(write_recipe, registry, cache, tmp_path):
    uniform = go(write_recipe(), registry, cache)
    path = write_recipe("loss", output=str(tmp_path / "loss"), allocate={"method": "by_loss"})
    by_loss = go(path, registry, cache)
    assert by_loss["budget"]["attained"] <= by_loss["budget"]["allowed"]
    assert by_loss["budget"]["shortfall_fraction"] <= 0.005

    def ranks(metrics):
        return [bank["summary"] for layer in metrics["layers"] for bank in layer["banks"].values()]

    assert ranks(by_loss) != ranks(uniform)


def test_the_trace_measures_what_was_lost(write_recipe, registry, cache):
    rows = [
        row for layer in go(write_recipe(), registry, cache)["layers"] for row in layer["trace"]
    ]
    assert {row["bank"] for row in rows} == {"experts.gate", "experts.up", "experts.down"}
    assert all(0 < row["bank_error"] < 1 and 0 < row["layer_error"] < 1 for row in rows)


def test_companions_and_reports_are_written(write_recipe, registry, cache, tmp_path):
    path = write_recipe(
        evaluate={
            "perplexity": [
                {
                    "name": "bible",
                    "text": str(TEXT / "test" / "bible.jsonl"),
                    "length": 64,
                    "windows": 6,
                }
            ]
        }
    )
    metrics = go(path, registry, cache)
    out = tmp_path / "out"
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "report.md",
        "README.md",
        "metrics.json",
        "run.log",
        "recipe.yaml",
        "config.json",
    ):
        assert (out / name).is_file(), name
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert metrics["evaluation"]["compressed"]["perplexity"]["bible"]["windows"] == 6
    again = go(path, registry, cache)
    assert again == json.loads((out / "metrics.json").read_text())


def test_a_budget_that_changes_nothing_is_refused(write_recipe, registry, cache):
    path = write_recipe(
        steps=[{"decompose": "svd", "size": {"keep": 1.0}}], budget=None, calibration=None
    )
    with pytest.raises(UserError, match="nothing would change"):
        go(path, registry, cache)


def test_an_impossible_budget_names_what_is_possible(write_recipe, registry, cache):
    path = write_recipe(budget={"remove": 0.9, "of": "model"})
    with pytest.raises(UserError, match=r"at most \d+\.\d% of the model can be removed"):
        go(path, registry, cache)


def test_untouched_tensors_are_copied_bit_by_bit(write_recipe, registry, cache, mixtral, tmp_path):
    go(write_recipe(), registry, cache)
    before, after = Source(mixtral), Source(tmp_path / "out")
    kept = [name for name in after.tensors if "terms_" not in name]
    assert any("self_attn" in name for name in kept) and any("gate" in name for name in kept)
    with before.slices(kept) as old, after.slices(kept) as new:
        for name in kept:
            assert torch.equal(old[name][...], new[name][...]), name


def test_untied_embeddings_run_whole_without_calibration(registry, cache, tmp_path, write_recipe):
    path = save_mixtral(tmp_path / "untied", seed=3, tie_word_embeddings=False)
    recipe = write_recipe(
        model=str(path), calibration=None, steps=[{"decompose": "svd"}], gate=True
    )
    metrics = go(recipe, registry, cache)
    assert metrics["gate"]["fresh_process_equal"]


def test_plugins_hear_of_the_run_and_add_columns(write_recipe, cache, tmp_path):
    import mctk_allocate
    import mctk_svd
    from mctk.hookspecs import hookimpl
    from mctk.registry import Registry
    from mctk.report import side_by_side

    heard = []

    class Listener:
        @hookimpl
        def run_started(self, run):
            heard.append("started")

        @hookimpl
        def layer_done(self, run, layer):
            heard.append(f"layer {layer}")

        @hookimpl
        def table_columns(self, run):
            return {"licence": "mine"}

    registry = Registry([mctk_svd, mctk_allocate, Listener()])
    path = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    metrics = go(path, registry, cache)
    assert heard == ["started", "layer 0", "layer 1", "layer 2"]
    assert "licence" in side_by_side([metrics]).markdown()
    assert "mine" in side_by_side([metrics]).markdown()
