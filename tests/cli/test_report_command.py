from __future__ import annotations

import json

import pytest
from mctk.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["report", *arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_runs_side_by_side_in_three_formats(capsys, tmp_path):
    for name, parameters in (("one", 80), ("two", 60)):
        sizes = {"original": {"parameters": 100}, "attained": {"parameters": parameters}}
        metrics = {"model": {"name": "m"}, "sizes": sizes, "budget": {"requested": name}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    directories = [str(tmp_path / "one"), str(tmp_path / "two")]
    code, out, _ = run(capsys, *directories)
    assert code == 0 and "80.0 %" in out and "60.0 %" in out
    code, out, _ = run(capsys, *directories, "--format", "json")
    assert [row["parameters"] for row in json.loads(out)] == [100, 80, 60]
    code, out, _ = run(capsys, *directories, "--format", "csv")
    assert out.splitlines()[1].startswith("original,100")


def test_runs_that_would_look_alike_bear_their_directory(capsys, tmp_path):
    metrics = {"model": {"name": "m"}, "budget": {"requested": "half"}, "steps": []}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    _, out, _ = run(capsys, str(tmp_path / "one"), str(tmp_path / "two"))
    assert "(one)" in out and "(two)" in out


def test_a_directory_without_a_finished_run(capsys, tmp_path):
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "is it a finished run?" in err
    (tmp_path / "metrics.json").write_text("{")
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "cannot be read" in err


def test_of_several_those_without_a_run_are_named_and_passed_over(capsys, tmp_path):
    for name in ("begun", "done"):
        (tmp_path / name).mkdir()
    (tmp_path / "done" / "metrics.json").write_text(json.dumps({"model": {"name": "m"}}))
    begun, done = str(tmp_path / "begun"), str(tmp_path / "done")
    code, out, err = run(capsys, begun, done)
    assert code == 0 and out.startswith("|") and f"{begun}: passed over" in err
    code, _, err = run(capsys, begun, str(tmp_path))
    assert code == 2 and "none of these directories holds a finished run" in err
