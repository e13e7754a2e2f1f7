"""A model that sees, hears and talks: its writer is compressed, all else comes along untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.evaluate import evaluate_model
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel

from tests.families.check import save
from tests.families.methods import write_recipe

FAMILY = "qwen3_omni_moe"
PROCESSOR = "preprocessor_config.json"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """The original and the result beside it, the run's metrics and its recipe."""
    directory = tmp_path_factory.mktemp("composite")
    save(FAMILY, directory / "model")
    (directory / "model" / PROCESSOR).write_text('{"size": 4}')
    registry = load_plugins()
    path = write_recipe(
        directory,
        "result",
        {
            "budget": {"remove": 0.05, "of": "model"},
            "steps": [
                {
                    "decompose": "svd",
                    "targets": "experts.*",
                    "size": "auto",
                    "options": {"rank_multiple": 1},
                }
            ],
            "evaluate": {
                "perplexity": [
                    {"name": "text", "text": str(directory / "text.jsonl"), "length": 32}
                ]
            },
        },
    )
    recipe = load_recipe(path, registry=registry)
    [metrics] = run([recipe], registry, cache=directory / "cache")
    return directory, metrics, recipe


def test_the_original_class_loads_it_with_the_same_bits(done):
    _, metrics, _ = done
    assert metrics["gate"]["fresh_process_equal"] is True
    assert metrics["model"]["auto_class"] == "AutoModelForMultimodalLM"


def test_what_is_not_text_is_copied(done):
    directory, _, _ = done
    source, result = Source(directory / "model"), Source(directory / "result")
    side = StreamedModel(source).side_tensors
    assert set(side.values()) >= {"talker", "code2wav", "thinker.model.visual"}
    with source.slices(side) as before, result.slices(side) as after:
        for name in side:
            assert torch.equal(before[name][...], after[name][...]), name
    assert source.config.items() <= result.config.items()  # only keys of ours come on top
    assert (directory / "result" / PROCESSOR).read_text() == '{"size": 4}'


def test_a_budget_of_the_model_counts_everything_stored(done):
    directory, metrics, _ = done
    stored = sum(info.numel for info in Source(directory / "model").tensors.values())
    kept = sum(info.numel for info in Source(directory / "result").tensors.values())
    assert metrics["sizes"]["original"]["parameters"] == stored
    assert metrics["sizes"]["attained"]["parameters"] == kept <= 0.95 * stored
    weighs = StreamedModel(Source(directory / "result"))
    assert set(weighs.side_tensors) == set(StreamedModel(Source(directory / "model")).side_tensors)


def test_perplexity_in_memory_and_streamed(done):
    directory, metrics, recipe = done
    assert recipe.evaluate is not None
    own = metrics["evaluation"]["compressed"]["perplexity"]["text"]["nll"]
    streamed = evaluate_model(
        directory / "result", recipe.evaluate, device="cpu", dtype="float32", streamed=True
    )
    assert streamed["mode"] == "streamed"
    assert streamed["perplexity"]["text"]["nll"] == pytest.approx(own, rel=1e-5)


def test_the_card_says_how_to_load_it(done):
    directory, _, _ = done
    card = (directory / "result" / "README.md").read_text()
    assert "model = AutoModelForMultimodalLM.from_pretrained(path)" in card
    assert "pipeline_tag: any-to-any" in card
