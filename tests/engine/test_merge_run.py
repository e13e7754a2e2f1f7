"""Merges into groups through whole runs: sizes, thresholds over layers, files, every family."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.errors import RecipeError
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel, stream_logits

from tests.engine.conftest import DEMO
from tests.families import FAMILIES, save_remote, tiny

MERGES = [
    {"merge": "m_smoe"},
    {"merge": "hc_smoe", "options": {"linkage": "ward", "align": True}},
    {"merge": "average", "options": {"group_by": "router"}},
]


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def logits(path: Path) -> torch.Tensor:
    ids = torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))
    return torch.cat(list(stream_logits(StreamedModel(Source(path), dtype="float32"), ids)))


def groups(metrics) -> list[int]:
    """How many experts' worth of up each layer stores."""
    return [
        layer["banks"]["experts.up"]["parameters"] // (48 * 80) if layer["banks"] else 4
        for layer in metrics["layers"]
    ]


@pytest.mark.parametrize("step", MERGES, ids=lambda step: step["merge"])
def test_plan_and_files_agree(write_recipe, registry, cache, step):
    path = write_recipe(steps=[step], budget={"remove": 0.5, "of": "experts"}, gate=True)
    recipe = load_recipe(path, registry=registry)
    planned = describe(make_plan(recipe, registry))
    # What a token computes depends on which experts share weights, and only data tell.
    assert set(planned["sizes"]["at_most"]) == {"active_parameters", "macs_per_token"}
    fresh = step["merge"] == "m_smoe"  # they store the same terms: one process is enough
    (metrics,) = run([recipe], registry, cache=cache, fresh_process=fresh)
    assert metrics["gate"]["streamed_equal"]
    assert metrics["gate"].get("fresh_process_equal") is (True if fresh else None)
    assert metrics["output_kind"] == "mctk"
    assert groups(metrics) == [2, 2, 2]
    assert metrics["budget"]["attained"] == metrics["budget"]["allowed"]
    sizes = metrics["sizes"]
    for key in ("parameters", "bytes", "expert_parameters"):
        assert sizes["planned"][key] == sizes["attained"][key]
    assert sizes["attained"]["active_parameters"] < sizes["original"]["active_parameters"]
    assert sizes["attained"]["macs_per_token"] < sizes["original"]["macs_per_token"]
    assert planned["speed"]["bound"] is None


@pytest.mark.parametrize("step", MERGES, ids=lambda step: step["merge"])
def test_as_many_groups_as_experts_is_the_identity(
    write_recipe, registry, cache, mixtral, tmp_path, step
):
    rest = {"decompose": "svd", "targets": ["attention.o"], "size": {"rank": 40}}
    for name, steps in (("a", [{**step, "size": {"rank": 4}}, rest]), ("b", [rest])):
        path = write_recipe(name, budget=None, steps=steps, output=str(tmp_path / name))
        run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


def test_one_threshold_over_all_layers(write_recipe, registry, cache, tmp_path):
    shared = {"steps": [{"merge": "m_smoe"}], "budget": {"remove": 0.5, "of": "experts"}}
    found = {}
    for name in ("uniform", "by_score"):
        path = write_recipe(name, allocate={"method": name}, output=str(tmp_path / name), **shared)
        (found[name],) = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert groups(found["uniform"]) == [2, 2, 2]
    counts = [layer["tokens_per_expert"] for layer in found["by_score"]["layers"]]
    ranked = [sorted(layer, reverse=True) for layer in counts]
    got = groups(found["by_score"])
    assert sum(got) == 6 and min(got) >= 1
    inside = [n for row, k in zip(ranked, got, strict=True) for n in row[1:k]]
    outside = [n for row, k in zip(ranked, got, strict=True) for n in row[max(k, 1) :]]
    assert min(inside) >= max(outside)


@pytest.mark.parametrize(
    ("steps", "allocate", "message"),
    [
        (MERGES[:1], "by_loss", r"compares squared errors, and steps\.0 \(merge/m_smoe\) has only"),
        (MERGES[1:2], "by_score", r"compares scores, and steps\.0 \(merge/hc_smoe\) gives none"),
        (
            [{"decompose": "svd_llm"}],
            "by_score",
            r"compares scores, and steps\.0 \(decompose/svd_llm\) has squared errors",
        ),
    ],
)
def test_allocators_compare_what_they_can(write_recipe, registry, steps, allocate, message):
    path = write_recipe(steps=steps, allocate={"method": allocate})
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, registry=registry)


def test_half_of_an_expert_is_not_merged(write_recipe, registry):
    step = {**MERGES[0], "targets": ["experts.up", "experts.down"]}
    with pytest.raises(RecipeError, match="experts"):
        make_plan(load_recipe(write_recipe(steps=[step]), registry=registry), registry)


def test_more_groups_than_experts_are_refused(write_recipe, registry):
    path = write_recipe(budget=None, steps=[{**MERGES[0], "size": {"rank": 9}}])
    with pytest.raises(RecipeError, match=r"9 groups in layer 0, whose 4 experts allow 1 to 4"):
        describe(make_plan(load_recipe(path, registry=registry), registry))


def test_merged_then_decomposed(write_recipe, registry, cache):
    """What a group stores is one matrix, and is decomposed once."""
    steps = [
        {"merge": "hc_smoe", "size": {"rank": 2}},
        {"decompose": "svd", "options": {"rank_multiple": 1, "storage": "pivoted"}},
    ]
    path = write_recipe(steps=steps, budget={"remove": 0.7, "of": "experts"}, gate=True)
    recipe = load_recipe(path, registry=registry)
    (metrics,) = run([recipe], registry, cache=cache, fresh_process=False)
    assert metrics["gate"]["streamed_equal"]
    assert metrics["budget"]["shortfall_fraction"] <= 0.005
    summary = metrics["layers"][0]["banks"]["experts.up"]["summary"]
    assert "lowrank" in str(summary)


@pytest.mark.parametrize("family", [*FAMILIES, "remote list"])
def test_every_family(family, tmp_path, cache, write_recipe, registry):
    model = tmp_path / "model"
    if family == "remote list":
        save_remote(model, vocab_size=4096)
    else:
        tiny(family, vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    recipes = [
        load_recipe(
            write_recipe(
                step["merge"],
                model=str(model),
                trust_remote_code=family == "remote list",
                steps=[step],
                output=str(tmp_path / step["merge"]),
                budget={"remove": 0.5, "of": "experts"},
                gate=True,
            ),
            registry=registry,
        )
        for step in MERGES[:2]
    ]
    # Loading in a fresh process is tested per family in tests/runtime, in one process for all.
    for metrics in run(recipes, registry, cache=cache, fresh_process=False):
        assert metrics["gate"]["streamed_equal"] is True
        sizes = metrics["sizes"]
        assert sizes["attained"]["expert_parameters"] * 2 == sizes["original"]["expert_parameters"]
        errors = [row["layer_error"] for layer in metrics["layers"] for row in layer["trace"]]
        assert errors and all(error is not None and error > 0 for error in errors)
