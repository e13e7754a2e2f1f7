"""NAEE through whole runs: native output, the same number of experts, skipping after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.errors import UserError
from mctk.planning import make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.runtime import dynamic_pruning
from mctk.sweep import StreamedModel, stream_logits
from transformers import AutoModelForCausalLM

NAEE = {"prune": "naee", "size": "auto"}
SKIP = {"prune": "skip_experts"}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def finished(path: Path, registry, cache) -> dict:
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    return metrics


def ids() -> torch.Tensor:
    return torch.randint(0, 4096, (2, 48), generator=torch.Generator().manual_seed(1))


def notes_of(metrics) -> list[str]:
    return [note["text"] for layer in metrics["layers"] for note in layer["notes"]]


def test_pruned_experts_leave_an_ordinary_model(write_recipe, registry, cache, tmp_path):
    path = write_recipe(steps=[NAEE], budget={"remove": 0.25, "of": "experts"}, gate=True)
    metrics = finished(path, registry, cache)
    assert metrics["output_kind"] == "native"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 3 and "quantization_config" not in config
    notes = notes_of(metrics)
    assert len(notes) == 3
    assert all("exact search, 4 subsets tried, loss" in note for note in notes)
    streamed = torch.cat(list(stream_logits(StreamedModel(Source(tmp_path / "out")), ids())))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    model.set_experts_implementation("mctk")
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, streamed)


def test_skipping_is_calibrated_on_what_is_left(write_recipe, registry, cache, tmp_path):
    """And is a policy of the run time: stored sizes are those of the pruned model."""
    steps = [{**NAEE, "size": {"rank": 3}}]
    pruned = finished(write_recipe(steps=steps, budget=None), registry, cache)
    out = tmp_path / "skipping"
    path = write_recipe("skip", steps=[*steps, SKIP], budget=None, output=str(out), gate=True)
    metrics = finished(path, registry, cache)
    assert metrics["output_kind"] == "mctk" and pruned["output_kind"] == "native"
    for key in ("parameters", "bytes"):
        assert metrics["sizes"]["attained"][key] == pruned["sizes"]["attained"][key]
    for key in ("active_parameters", "macs_per_token"):
        assert metrics["sizes"]["attained"][key] < pruned["sizes"]["attained"][key]
    skips = [note for note in notes_of(metrics) if note.startswith("skips ranks 2 to 2 below")]
    assert len(skips) == 3 and all("of 2 experts a token" in note for note in skips)
    ratios = [
        spec["ratios"]
        for module in json.loads((out / "config.json").read_text())["quantization_config"][
            "modules"
        ].values()
        for spec in module["terms"]["down"]
        if spec["kind"] == "skip"
    ]
    assert len(ratios) == 3 and all(0 < ratio < 1 for [ratio] in ratios)

    # As if the pruned model itself had been calibrated: in layer 0 nothing came before.
    again = write_recipe(
        "again", model=str(tmp_path / "out"), steps=[SKIP], budget=None, output=str(tmp_path / "b")
    )
    finished(again, registry, cache)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    first = config["quantization_config"]["modules"]["model.layers.0.mlp.experts"]
    assert first["terms"]["down"][-1]["ratios"] == pytest.approx(ratios[0], rel=1e-3)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    model.set_experts_implementation("mctk")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    plain.set_experts_implementation("mctk")
    with torch.no_grad():
        skipping, all_computed = model(ids()).logits, plain(ids()).logits
        assert not torch.equal(skipping, all_computed)
        with dynamic_pruning(model, False):
            assert torch.equal(model(ids()).logits, all_computed)


def test_progressive_pruning_feeds_the_pruned_layers(write_recipe, registry, cache, tmp_path):
    """The first layer is judged alike; later ones have a loss even with all experts."""
    found = {}
    for propagate in ("original", "compressed"):
        path = write_recipe(
            propagate,
            steps=[{**NAEE, "size": {"rank": 2}}],
            budget=None,
            output=str(tmp_path / propagate),
            calibration={
                "text": str(Path(__file__).parents[2] / "recipes/demo/text/calibration/*.jsonl"),
                "sequences": 8,
                "length": 64,
                "propagate": propagate,
            },
        )
        found[propagate] = notes_of(finished(path, registry, cache))
    assert found["original"][0] == found["compressed"][0]
    assert found["original"][1:] != found["compressed"][1:]
    losses = {
        key: [float(n.split("loss ")[1].split(",")[0]) for n in notes]
        for key, notes in found.items()
    }
    assert losses["compressed"][2] > losses["original"][2]


def test_parts_of_experts_are_refused_in_the_plan(write_recipe, registry):
    for step in ({**NAEE, "size": {"rank": 3}}, SKIP):
        parts = {**step, "targets": ["experts.up", "experts.down"]}
        path = write_recipe(steps=[parts], budget=None)
        with pytest.raises(UserError, match=r"whole experts, .* experts.gate is not among"):
            make_plan(load_recipe(path, registry=registry), registry)
    path = write_recipe(steps=[{**NAEE, "targets": ["experts.*", "attention.q"]}])
    with pytest.raises(UserError, match=r"whole experts, .* not attention.q: target experts"):
        make_plan(load_recipe(path, registry=registry), registry)
