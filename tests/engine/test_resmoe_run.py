"""ResMoE through whole runs: exact merges, exact sizes, what is said about the work."""

from __future__ import annotations

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel, stream_logits

MERGE = {"merge": "wasserstein"}
LOW_RANK = {"storage": "pivoted", "rank_multiple": 1}
REST = {
    "up": {"prune": "up", "options": {"entry_multiple": 1}},
    "positions": {"prune": "up", "options": {"entry_multiple": 1, "storage": "positions"}},
    "joint_svd": {"prune": "joint_svd", "options": LOW_RANK},
    "svd": {"decompose": "svd", "options": LOW_RANK},
    "delta_svd": {"decompose": "delta_svd", "options": LOW_RANK},
}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def logits(path):
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))
    return torch.cat(list(stream_logits(StreamedModel(Source(path), dtype="float32"), ids)))


@pytest.mark.parametrize("rest", REST)
def test_the_budget_is_attained_with_the_barycenter(rest, write_recipe, registry, cache):
    data = rest == "delta_svd"
    path = write_recipe(
        steps=[MERGE, {**REST[rest], "size": "auto"}],
        allocate={"method": "uniform"},
        gate=True,
        **({} if data else {"calibration": None}),
    )
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["gate"]["streamed_equal"] is True
    planned, attained = metrics["sizes"]["planned"], metrics["sizes"]["attained"]
    for key in ("parameters", "bytes"):
        assert planned[key] == attained[key]
    assert 0 <= metrics["budget"]["shortfall_fraction"] <= 0.01
    for layer in metrics["layers"]:
        [note] = [n for n in layer["notes"] if n["step"] == "merge/wasserstein"]
        path = [float(v) for v in note["text"].split("iteration ")[1].split(" (")[0].split(", ")]
        assert path == sorted(path, reverse=True)


def test_all_entries_kept_is_the_original(write_recipe, registry, cache, mixtral, tmp_path):
    entries = 3 * 48 * 80
    path = write_recipe(
        dtype="float32",
        storage_dtype="float32",
        budget=None,
        calibration=None,
        steps=[{**MERGE, "options": {"start": "all"}}, {**REST["up"], "size": {"rank": entries}}],
    )
    run([load_recipe(path, registry=registry)], registry, cache=cache)
    exact, ours = logits(mixtral), logits(tmp_path / "out")
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("bits", [3, 4])
def test_entries_can_be_packed(bits, write_recipe, registry, cache):
    """Whole groups in every bank: the plan knows the bytes."""
    path = write_recipe(
        steps=[
            MERGE,
            {"prune": "up", "size": {"keep": 0.4}},
            {"quantize": "rtn", "options": {"bits": bits}},
        ],
        budget=None,
        calibration=None,
        gate=True,
    )
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["sizes"]["planned"]["bytes"] == metrics["sizes"]["attained"]["bytes"]


def test_a_budget_in_bytes_counts_bitmaps(write_recipe, registry, cache):
    path = write_recipe(
        steps=[MERGE, {**REST["up"], "size": "auto"}],
        budget={"remove": 0.4, "of": "experts", "unit": "bytes"},
        allocate={"method": "uniform"},
        calibration=None,
    )
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["sizes"]["planned"]["bytes"] == metrics["sizes"]["attained"]["bytes"]
    assert 0 <= metrics["budget"]["shortfall_fraction"] <= 0.01
