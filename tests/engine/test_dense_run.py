"""The whole engine on a dense model; `tests/test_every_family.py` has those with experts."""

from __future__ import annotations

import shutil
from pathlib import Path

from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.engine.conftest import DEMO
from tests.families import tiny


def test_a_dense_model_is_compressed_whole(tmp_path: Path, cache: Path, write_recipe):
    model = tmp_path / "model"
    tiny("llama", vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    path = write_recipe(
        model=str(model),
        steps=[
            {
                "decompose": "svd_llm",
                "targets": ["attention.*", "mlp.*"],
                "options": {"rank_multiple": 1, "storage": "pivoted"},
            }
        ],
        budget={"remove": 0.4, "of": "targets"},
        gate=True,
    )
    registry = load_plugins()
    recipes = [load_recipe(path, registry=registry)]
    # Loading in a fresh process is tested in tests/runtime, in one process for all families.
    [metrics] = run(recipes, registry, cache=cache, fresh_process=False)
    assert metrics["gate"]["streamed_equal"] is True
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    # One rank of the largest of these tiny banks is up to 1 % of all targets.
    assert 0 <= metrics["budget"]["shortfall_fraction"] <= 0.01
    errors = [row["bank_error"] for layer in metrics["layers"] for row in layer["trace"]]
    assert errors and all(error is not None and 0 <= error < 1 for error in errors)
