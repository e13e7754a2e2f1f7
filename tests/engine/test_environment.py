"""A run records what it was made with and on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from mctk.engine import run
from mctk.engine.environment import source_commit
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.report import render_report

from tests.report.example_metrics import metrics as example


def test_every_run_records_versions_device_and_source(write_recipe, cache, tmp_path):
    registry = load_plugins()
    recipe = load_recipe(
        write_recipe(calibration=None, steps=[{"decompose": "svd"}]), ["device=cpu"], registry
    )
    run([recipe], registry, cache=cache)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"python", "torch", "transformers", "accelerate", "safetensors", "numpy"} < set(
        metrics["versions"]
    )
    found = metrics["environment"]
    assert (found["device"], found["dtype"], found["cuda"]) == ("cpu", "bfloat16", None)
    assert found["device_name"] and found["platform"]
    assert found["threads"] == torch.get_num_threads()
    assert found["mctk_commit"] == source_commit()
    assert "bfloat16, on cpu (" in (tmp_path / "out" / "report.md").read_text()


def test_the_report_says_it_in_one_line():
    assert (
        "bfloat16, on cuda:0 (NVIDIA H100), CUDA 13.0, 16 threads, Linux x86_64, "
        "mctk at commit 2042215+"
    ) in render_report(example())


def git(directory: Path, *arguments: str) -> str:
    who = {
        f"GIT_{role}_{what}": "a@b"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments],
        env={**os.environ, **who}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_commit_of_a_clone_and_whether_it_was_changed(tmp_path):
    git(tmp_path, "init")
    assert source_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(tmp_path) == head
    (tmp_path / "other").write_text("unknown to git")
    assert source_commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert source_commit(tmp_path) == f"{head}+"


@pytest.mark.parametrize(
    ("origin", "commit"),
    [(None, None), ("{}", None), ('{"url": "x", "vcs_info": {"commit_id": "abc"}}', "abc")],
)
def test_the_commit_that_a_package_was_installed_from(monkeypatch, tmp_path, origin, commit):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return origin

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert source_commit(tmp_path) == commit
