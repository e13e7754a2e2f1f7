"""The whole engine on every family: calibrate, whiten, write, and stream the written files."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.engine.conftest import DEMO
from tests.families import FAMILIES, tiny


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_family_is_compressed_whole(
    family: str, tmp_path: Path, cache: Path, write_recipe, monkeypatch
):
    model = tmp_path / "model"
    tiny(family, vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    # Loading in a fresh process is tested per family in tests/runtime, in one process for all.
    module = sys.modules["mctk.engine.finish"]
    left_out = {"fresh_process_equal": None}
    monkeypatch.setattr(module, "check_fresh_process", lambda *arguments: left_out)
    targets = ["attention.*", "mlp.*"] if family == "llama" else ["experts.*", "attention.o"]
    path = write_recipe(
        model=str(model),
        steps=[
            {
                "decompose": "svd_llm",
                "targets": targets,
                "options": {"rank_multiple": 1, "storage": "pivoted"},
            }
        ],
        budget={"remove": 0.4, "of": "targets"},
        gate=True,
    )
    registry = load_plugins()
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["gate"]["streamed_equal"] is True
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    # One rank of the largest of these tiny banks is up to 1 % of all targets.
    assert 0 <= metrics["budget"]["shortfall_fraction"] <= 0.01
    errors = [row["bank_error"] for layer in metrics["layers"] for row in layer["trace"]]
    assert errors and all(error is not None and 0 <= error < 1 for error in errors)
