"""lm-eval's own command line on results: native ones as it is, others by `mctk.lm_eval`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mctk.engine import run
from mctk.evaluate import evaluate_model
from mctk.recipe import Evaluate, load_recipe
from mctk.registry import load_plugins

from tests.tiny_checkpoint import save_checkpoint

pytest.importorskip("lm_eval")
DATA = Path(__file__).parents[1] / "fixtures" / "tasks" / "after.jsonl"
STEPS = {
    "native": {"prune": "random", "size": {"rank": 2}},
    "mctk": {"decompose": "svd", "size": {"rank": 4}},
}
TASK = {
    "task": "mctk_told",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(DATA)}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[answer]}}",
    # Unlike an accuracy it moves with every bit of the model.
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two results, and a task over local data."""
    place = tmp_path_factory.mktemp("lm_eval")
    save_checkpoint(place / "model")
    (place / "tasks").mkdir()
    (place / "tasks" / "told.yaml").write_text(yaml.safe_dump(TASK))
    registry = load_plugins()
    for kind, step in STEPS.items():
        recipe = {"model": str(place / "model"), "output": str(place / kind), "steps": [step]}
        [metrics] = run([load_recipe(recipe | {"gate": False}, (), registry)], registry)
        assert metrics["output_kind"] == kind
    return place


def arguments(place: Path, kind: str) -> list[str]:
    return [
        "--model", "hf", "--tasks", "mctk_told", "--device", "cpu",
        "--model_args", f"pretrained={place / kind},dtype=float32",
        "--include_path", str(place / "tasks"), "--output_path", str(place / f"{kind}.json"),
    ]  # fmt: skip


def check(place: Path, kind: str) -> float:
    """The command's figure is that of `mctk eval`; returns it."""
    [file] = place.glob(f"{kind}_*.json")
    theirs = json.loads(file.read_text())["results"]["mctk_told"]["perplexity,none"]
    file.unlink()
    section = Evaluate(tasks=["mctk_told"])
    found = evaluate_model(place / kind, section, device="cpu", task_path=[place / "tasks"])
    ours = found["tasks"]["mctk_told"]["metrics"]["perplexity"]["value"]
    assert theirs == pytest.approx(ours, rel=1e-9)
    return ours


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_its_figures_are_those_of_mctk_eval(place, monkeypatch):
    """In this process, and without lm-eval's own 14 000 tasks: indexing them takes many seconds."""
    from lm_eval import tasks
    from mctk import lm_eval as ours

    own = functools.partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", own)
    for kind in STEPS:
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments(place, kind)])
        ours.main()
    assert check(place, "native") != pytest.approx(check(place, "mctk"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module", "loads"),
    [("native", "lm_eval", True), ("mctk", "mctk.lm_eval", True), ("mctk", "lm_eval", False)],
)
def test_the_command_as_it_is_typed(place, kind, module, loads, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments(place, kind)],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) is loads, done.stderr
    if loads:
        check(place, kind)
    else:  # why there is another module
        assert "got mctk" in done.stderr
