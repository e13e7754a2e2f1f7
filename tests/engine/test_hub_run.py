"""Runs on a hub model: its commit is resolved once and recorded; a branch that moved is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mctk.cli import main
from mctk.comparison.file import load_comparison
from mctk.comparison.identity import Memory, find_inputs
from mctk.engine import run
from mctk.errors import RecipeError, UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.hub_cache import cache_model

NAME = "owner/tiny"


@pytest.fixture
def home(tmp_path, monkeypatch, mixtral) -> tuple[Path, str]:
    """An HF_HOME whose cache holds a model, and the model's commit."""
    card = tmp_path / "source"
    shutil.copytree(mixtral, card)
    (card / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    commit = cache_model(tmp_path / "home", NAME, card, refs=("main", "v1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home", commit


def go(recipe: Path, cache: Path, *overrides: str):
    registry = load_plugins()
    loaded = load_recipe(recipe, overrides, registry)
    return run([loaded], registry, cache=cache)[0]


def test_a_run_records_the_commit_and_a_moved_branch_is_told(home, write_recipe, cache, tmp_path):
    place, commit = home
    recipe = write_recipe(model=f"{NAME}@v1", calibration=None, steps=[{"decompose": "svd"}])
    metrics = go(recipe, cache)
    model = metrics["model"]
    assert (model["name"], model["hub"], model["revision"]) == (NAME, NAME, "v1")
    assert model["commit"] == commit and model["license"] == "mit"
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == NAME and front["base_model_relation"] == "quantized"
    assert re.search(rf"commit of the model +\| {commit}", (tmp_path / "out/report.md").read_text())

    # Another branch of the same contents is the same model: the run is taken up, not made again.
    assert go(recipe, cache, f"model={NAME}@main") == metrics
    # The branch moves to other weights.
    changed = tmp_path / "source"
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2e-5}))
    moved = cache_model(place, NAME, changed, refs=("v1",))
    with pytest.raises(UserError, match=rf"moved on the hub, from commit {commit}.*to {moved}; wr"):
        go(recipe, cache)
    assert go(recipe, cache, f"model={NAME}@{commit}") == metrics


def test_mistakes_are_placed_at_the_key(home, write_recipe, mixtral):
    def refused(**changes) -> str:
        recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}], **changes)
        with pytest.raises(RecipeError) as error:
            go(recipe, mixtral)
        assert str(error.value).startswith(f"{recipe}:")
        return str(error.value)

    assert "key model: owner/tini is not in the hub's cache" in refused(model="owner/tini")
    assert "a branch, tag or commit must follow the @" in refused(model=f"{NAME}@")
    assert "key revision: has no effect: model names 'v1'" in refused(
        model=f"{NAME}@v1", revision="main"
    )


def test_hf_home_is_honoured_and_a_cached_model_works_offline(home):
    """In a process of its own: the client reads its environment when it is imported."""
    place, commit = home
    environment = {**os.environ, "HF_HOME": str(place), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)  # would go before HF_HOME
    found = subprocess.run(
        [sys.executable, "-m", "mctk", "inspect", f"{NAME}@v1", "--json"], env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shown = json.loads(found.stdout)
    assert (shown["hub"], shown["commit"]) == (NAME, commit) and str(place) in shown["path"]


def test_plan_and_eval_take_the_name(home, capsys, write_recipe, tmp_path):
    _, commit = home
    recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    (tmp_path / "text.txt").write_text("In the beginning was the word. " * 20)
    shown = ["--text", str(tmp_path / "text.txt"), "--length", "16", "--windows", "1", "--quiet"]
    for arguments in (
        ["plan", str(recipe), "--model", f"{NAME}@v1"],
        ["eval", f"{NAME}@v1", *shown, "--json"],
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        captured = capsys.readouterr()
        assert exit.value.code == 0, captured.err
        assert commit in captured.out and NAME in captured.out


def test_all_rows_of_a_comparison_are_of_one_commit(home, tmp_path):
    """What moves on the hub while rows are made moves none of them."""
    place, commit = home
    rows = [{"steps": [{"decompose": "svd"}]}, {"steps": [{"prune": "magnitude"}]}]
    file = {"model": f"{NAME}@v1", "rows": rows, "budgets": {"remove": [0.2]}}
    loaded = load_comparison(file, (), load_plugins())
    before = [row.recipe.canonical() for row in loaded.rows]
    inputs = find_inputs(loaded, Memory(tmp_path / "memory.json"), tmp_path / "cache")
    assert inputs.commit == commit
    loaded.pin(inputs.commit)
    (place / "hub" / "models--owner--tiny" / "refs" / "v1").write_text("f" * 40)
    for row, known in zip(loaded.rows, before, strict=True):
        for spec in (row, loaded.in_bytes(row)):
            assert (spec.recipe.model, spec.recipe.revision) == (NAME, commit)
        assert row.recipe.canonical() == known  # the same run, whatever its branch is called
