"""A comparison's calls: what is reused, what is added, what fails, what goes on after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import mctk_svd
import pytest
import yaml
from click.testing import CliRunner
from mctk.cli.compare import command
from mctk.comparison import work, workers
from mctk.comparison.file import load_comparison
from mctk.comparison.result import load
from mctk.comparison.run import run_comparison
from mctk.engine import compress
from mctk.errors import UserError
from mctk.registry import load_plugins

from tests.tiny_run import TEXT

SVD = {"name": "svd", "steps": [{"decompose": "svd", "options": {"rank_multiple": 1}}]}
WHITE = {"name": "white", "steps": [{"decompose": "svd_llm", "options": {"rank_multiple": 1}}]}
ROUND = {"name": "rtn", "budgets": "none", "steps": [{"quantize": "rtn", "options": {"bits": 4}}]}


@pytest.fixture
def compare(mixtral, tmp_path, cache):
    """Writes a comparison and runs it in this process; gives what was found."""

    def compare(rows, **changes):
        text = {"text": str(TEXT / "test" / "code.jsonl"), "length": 32, "windows": 4}
        data = {
            "model": str(mixtral),
            "calibration": {
                "text": str(TEXT / "calibration" / "*.jsonl"),
                "sequences": 6,
                "length": 32,
            },
            "budgets": {"remove": [0.4], "of": "experts"},
            "evaluate": {"perplexity": [{"name": "code", **text}], "divergence": True},
            "rows": rows,
            "output": str(tmp_path / "out"),
            **changes,
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        registry = load_plugins()
        loaded = load_comparison([path], registry=registry)
        words = ["mctk", "compare", str(path)]
        return run_comparison(loaded, registry, cache=cache, jobs=1, command=words)

    return compare


class Here:
    """Evaluates in this process: starting another takes seconds."""

    def submit(self, job):
        future = Future()
        future.set_result(workers.work(job))
        return future

    def outcomes(self, jobs):
        return ((job, workers.work(job)) for job in jobs)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(work, "workers", lambda count, threads: contextlib.nullcontext(Here()))


@pytest.fixture
def written(monkeypatch):
    """Counts the layers that are written."""
    layers = []
    own = compress.write_layer

    def write(plan, output, layer, *rest, **more):
        layers.append((output.name.partition("-")[0], layer))
        return own(plan, output, layer, *rest, **more)

    monkeypatch.setattr(compress, "write_layer", write)
    return layers


def test_a_comparison_from_start_to_end(compare, written, mixtral, tmp_path, monkeypatch):
    found = compare([SVD, ROUND])
    assert found.finished and [row.status for row in found.rows] == ["ok", "ok"]
    assert len(written) == 2 * 3
    svd, rounded = found.rows
    assert svd.budget == found.budgets[0] and rounded.budget is None
    assert svd.chain == "decompose/svd v1" and svd.allocate == "allocate/uniform v1"
    scope = svd.scope
    assert 0.595 * scope.original <= scope.attained <= scope.allowed <= 0.6 * scope.original
    assert svd.sizes.parameters < found.original.sizes.parameters
    assert rounded.sizes.parameters == found.original.sizes.parameters
    assert rounded.sizes.bytes < found.original.sizes.bytes
    text, before = svd.texts["code"], found.original.texts["code"]
    assert text.digest == before.digest and text.windows == 4 and len(text.window_nll) == 4
    assert text.change.value == pytest.approx(text.nll - before.nll)
    assert svd.overall.change.value == pytest.approx(text.change.value)
    assert text.divergence.kl.value > 0 and 0 <= text.divergence.agreement.value <= 1
    assert svd.overall.divergence.kl.value == pytest.approx(text.divergence.kl.value)
    assert {bank.layer for bank in svd.banks} == {0, 1, 2}
    assert all(bank.setting and bank.parameters < bank.original for bank in svd.banks)
    assert {(point.layer, point.step) for point in svd.trace} == {
        (layer, step) for layer in range(3) for step in ("decompose/svd", "as stored")
    }
    assert found.calibrations[0].digest and found.model.experts == 4
    assert found.calls == 1 and found.seconds["total"] > found.seconds["compress"] > 0
    assert "torch" in found.versions and "lm_eval" not in found.versions  # no task took part
    flag = next(flag for flag in svd.flags if flag.code == "few windows")
    assert "4 windows of a text" in flag.text
    gate = json.loads((tmp_path / "out" / "rows" / svd.key / "metrics.json").read_text())["gate"]
    assert gate["streamed_equal"] is True and gate["fresh_process_equal"] is True
    for form in ("json", "md", "csv", "tex", "html", "yaml"):
        written_file = tmp_path / "out" / f"comparison.{form}"
        assert written_file.stat().st_size > 100
        for private in (mixtral.parent, tmp_path, TEXT) if form != "json" else ():
            assert str(private) not in written_file.read_text(), (form, private)
    assert load(tmp_path / "out" / "comparison.json") == found

    # The same again computes nothing, and does not even get to where it would.
    monkeypatch.setattr(work, "work", None)
    stamp = (tmp_path / "out" / "comparison.html").stat().st_mtime_ns
    assert compare([SVD, ROUND]) == found
    assert (tmp_path / "out" / "comparison.html").stat().st_mtime_ns == stamp
    assert len(written) == 2 * 3


def test_an_added_row_is_the_only_one_made(here, compare, written, tmp_path):
    first = compare([SVD])
    written.clear()
    both = compare([SVD, WHITE])
    assert {name for name, _ in written} == {"white"} and len(written) == 3
    assert both.rows[0] == first.rows[0] and both.rows[1].status == "ok"
    # A row that changes is made anew, in a directory of its own; the old one is found again.
    written.clear()
    changed = {**SVD, "steps": [{"decompose": "svd", "options": {"rank_multiple": 2}}]}
    assert compare([changed]).rows[0].key != first.rows[0].key
    assert compare([SVD]).rows == first.rows
    assert len(written) == 3
    assert {path.name for path in (tmp_path / "out" / "rows").iterdir()} >= {first.rows[0].key}


def test_another_evaluation_makes_no_row_again(here, compare, written):
    first = compare([SVD])
    written.clear()
    text = {"name": "code", "text": str(TEXT / "test" / "code.jsonl"), "length": 32, "windows": 2}
    found = compare([SVD], evaluate={"perplexity": [text]})
    assert not written
    assert found.rows[0].key == first.rows[0].key
    assert found.rows[0].texts["code"].windows == 2
    assert found.rows[0].texts["code"].divergence is None


def test_rows_that_fail_stop_no_other(here, compare, monkeypatch):
    method = type(mctk_svd.methods()[0])
    own = method.decompose

    def decompose(self, bank, statistics, size, options):
        if bank.layer == 1:
            raise ZeroDivisionError("no luck")
        return own(self, bank, statistics, size, options)

    with monkeypatch.context() as patch:
        patch.setattr(method, "decompose", decompose)
        greedy = {**WHITE, "name": "greedy", "budgets": {"remove": [0.99], "of": "model"}}
        found = compare([SVD, greedy, WHITE])
    failed, refused, good = found.rows
    assert failed.status == "failed" and "ZeroDivisionError: no luck" in failed.reason
    assert refused.status == "refused" and "can be removed by these steps" in refused.reason
    assert good.status == "ok" and found.finished
    assert failed.sizes is None and failed.chain == "decompose/svd v1"
    again = compare([SVD, greedy, WHITE])
    assert [row.status for row in again.rows] == ["ok", "refused", "ok"]
    assert again.rows[2] == good


def test_sparse_and_packed_rows_are_budgeted_in_bytes(here, compare):
    sparse = {"name": "magnitude", "steps": [{"prune": "magnitude"}]}
    composed = {
        "name": "both",
        "steps": [*SVD["steps"], {"quantize": "rtn", "options": {"bits": 4}}],
        "budgets": {"remove": [0.4], "of": "experts", "unit": "parameters"},
    }
    rows = compare([sparse, composed, SVD]).rows
    assert [row.status for row in rows] == ["ok"] * 3
    magnitude, both, svd = rows
    assert magnitude.budget.unit == "bytes" and "bytes" in {flag.code for flag in magnitude.flags}
    assert magnitude.scope.attained <= magnitude.scope.allowed
    assert both.budget is None and both.name == "both −40 %"
    assert both.sizes.parameters == svd.sizes.parameters and both.sizes.bytes < svd.sizes.bytes
    assert svd.budget.unit == "parameters"


def test_seeds_are_calibrations(here, compare):
    rows = compare([WHITE], seeds=[0, 1]).rows
    assert [row.seed for row in rows] == [0, 1] and rows[0].budget == rows[1].budget
    assert rows[0].texts["code"].nll != rows[1].texts["code"].nll


def test_a_directory_of_something_else_is_refused(compare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no comparison"):
        compare([SVD])


def test_a_model_that_no_row_can_plan_is_an_error(here, compare):
    with pytest.raises(UserError, match="no bank of the chosen layers matches"):
        compare([{**SVD, "steps": [{"decompose": "svd", "targets": "nothing.*"}]}])


def test_exit_codes_and_what_is_printed(here, compare, tmp_path, cache):
    compare([SVD])
    runner = CliRunner()
    arguments = [str(tmp_path / "comparison.yaml"), "--cache", str(cache), "-q"]
    done = runner.invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "svd" in done.output and "comparison.html" in done.output
    done = runner.invoke(command, [*arguments, "--json"])
    assert json.loads(done.stdout)["rows"][0]["status"] == "ok"
    greedy = {**SVD, "name": "greedy", "budgets": {"remove": [0.99], "of": "model"}}
    compare([SVD, greedy])
    done = runner.invoke(command, arguments)
    assert done.exit_code == 1
    assert "refused: " in done.stderr and "can be removed by these steps" in done.stderr


def test_a_killed_comparison_goes_on(here, compare, tmp_path, cache):
    """Killed once the first layer is written: what is there is taken up, and ends the same."""
    whole = compare([SVD, WHITE], output=str(tmp_path / "whole"))
    compare_file = tmp_path / "comparison.yaml"
    arguments = [str(compare_file), "--cache", str(cache), "-o", str(tmp_path / "out"), "-q"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mctk", "compare", *arguments], env=environment
    )
    rows = tmp_path / "out" / "rows"
    deadline = time.monotonic() + 120
    while not list(rows.glob("*/model-00002*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(rows.glob("*/model-00002*"))
    again = compare([SVD, WHITE])
    assert [row.status for row in again.rows] == ["ok", "ok"]
    for ours, theirs in zip(again.rows, whole.rows, strict=True):
        assert ours.key == theirs.key and ours.texts == theirs.texts
        for file in (tmp_path / "whole" / "rows" / ours.key).glob("*.safetensors"):
            assert (rows / ours.key / file.name).read_bytes() == file.read_bytes()
