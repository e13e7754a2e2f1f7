"""From evaluations to figures: chance levels, averages, intervals, flags; and workers that die."""

from __future__ import annotations

import math
import os
import signal

import pytest
from mctk.comparison import rows, workers
from mctk.comparison.workers import Job, Workers
from mctk.recipe import Evaluate


def task(value, chance, constant=False, metric="acc", **more):
    return {
        "metrics": {metric: {"value": value, "stderr": 0.1}, "other": {"value": 9, "stderr": None}},
        "version": 1, "n_shot": 0, "samples": 100, "chance": chance, "constant": constant,
        "group": None, **more,
    }  # fmt: skip


def evaluation(nll, kl=None, tasks=None, **more):
    """Two texts, `b` of half as many windows; nll a token of each text."""
    texts, apart = {}, {}
    for name, value, windows in (("a", nll[0], 8), ("b", nll[1], 4)):
        texts[name] = {
            "protocol": "p", "digest": name, "windows": windows, "tokens": 10 * windows,
            "nll": value, "perplexity": math.exp(value), "window_nll": [10 * value] * windows,
        }  # fmt: skip
        if kl is not None:
            apart[name] = {
                "protocol": "k", "tokens": 10 * windows, "window_kl": [10 * kl] * windows,
                "window_same": [8] * windows, "kl": {"value": kl, "low": kl, "high": kl},
                "agreement": {"value": 0.8, "low": 0.8, "high": 0.8},
            }  # fmt: skip
    return {"perplexity": texts, "divergence": apart, "tasks": tasks or {}, **more}


def test_texts_weigh_the_same():
    before, after = evaluation((2.0, 3.0)), evaluation((2.1, 3.3), kl=0.05)
    found = rows.overall(after, before)
    assert found.perplexity == pytest.approx(math.exp(2.7))
    assert found.change.value == pytest.approx(0.2)  # not 0.167, the mean over all windows
    assert found.change.low == pytest.approx(0.2) == found.change.high
    assert found.divergence.kl.value == pytest.approx(0.05)
    assert found.divergence.agreement.value == pytest.approx(0.8)
    assert found.divergence.tokens == 120
    one = rows.texts(after, before)["b"]
    assert one.change.value == pytest.approx(0.3) and len(one.window_nll) == 4
    assert rows.texts(before, None)["b"].change is None


def test_other_tokens_are_not_compared():
    before, after = evaluation((2.0, 3.0)), evaluation((2.1, 3.3))
    after["perplexity"]["b"]["digest"] = "others"
    assert rows.overall(after, before).change is None
    assert rows.texts(after, before)["b"].change is None
    assert rows.texts(after, before)["a"].change is not None


def test_what_is_not_finite_is_no_figure():
    after = evaluation((2.0, 3.0))
    after["perplexity"]["b"] |= {"nll": None, "perplexity": None, "window_nll": [None] * 4}
    found = rows.overall(after, evaluation((2.0, 3.0)))
    assert found.perplexity is None and found.change is None


def test_chance_levels_and_the_average():
    found = evaluation((2, 3), tasks={
        "four": task(0.40, 0.25, metric="acc_norm"),
        "two": task(0.62, 0.5, constant=True),
        "part": task(0.9, 0.5, group="two"),
    })  # fmt: skip
    four, two = rows.tasks(found).values()
    assert (four.metric, four.value, four.chance) == ("acc_norm", 0.40, 0.25)
    assert two.constant and two.chance == 0.5
    mean = rows.average(found)
    assert mean.value == pytest.approx(0.51) and mean.chance == pytest.approx(0.375)
    assert mean.tasks == ["four", "two"]
    # A task without a chance level leaves the average without one; a single task has no average.
    found["tasks"]["free"] = task(0.1, None, metric="exact_match")
    assert rows.average(found).chance is None
    assert rows.average(evaluation((2, 3), tasks={"one": task(0.4, 0.25)})) is None


def metrics(**more):
    layer = {"layer": 0, "tokens_per_expert": [5, 0, 0], "banks": {}}
    return {"layers": [layer], "budget": None, "gate": None, "warnings": [], **more}


def test_flags_say_what_a_reader_should_know():
    budget = {"shortfall_fraction": 0.05}
    after = evaluation((2, 3), tasks={"two": task(0.6, 0.5, constant=True)})
    after["warnings"] = ["perplexity of a is inf", "tasks x were left out"]
    given = metrics(
        budget=budget,
        gate={"fresh_process_equal": None},
        warnings=["5.00% of the original less ...: the steps' sizes are too coarse", "no "
                  "calibration token reached layer 0 expert 1", "something else"],
    )  # fmt: skip
    found = {(flag.code, flag.text) for flag in rows._flags(given, after)}
    codes = [code for code, _ in found]
    assert sorted(codes) == sorted([
        "coarse", "few tokens", "warning", "warning", "not finite", "constant answers",
        "gate left out",
    ])  # fmt: skip
    assert ("few tokens", "no calibration token reached 2 experts") in found
    assert ("warning", "something else") in found


@pytest.mark.parametrize(
    ("nbytes", "plain"), [(200, True), (201, True), (400, True), (225, False), (56, False)]
)
def test_bits_and_positions_are_not_plain(nbytes, plain):
    bank = {"parameters": 100, "bytes": nbytes}
    assert rows._plain({"layers": [{"banks": {"experts.up": bank}}]}) is plain


def deadly(job: Job):
    if job.name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"name": job.name}


def test_a_worker_that_dies_costs_its_own_row_only(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "work", deadly)
    pool = Workers(1, 1)
    jobs = [Job(name, tmp_path, Evaluate(), {}) for name in ("a", "deadly", "b")]
    found = {job.name: outcome for job, outcome in pool.outcomes(jobs)}
    pool.close()
    assert found["a"] == {"name": "a"} and found["b"] == {"name": "b"}
    assert "was killed" in found["deadly"]
