"""A run of a set that fails ends by itself: in its plan, in a pass, in its evaluation."""

from __future__ import annotations

import importlib

import mctk_svd
import pytest
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.engine.conftest import TEXT


@pytest.fixture
def recipes(write_recipe, tmp_path):
    registry = load_plugins()

    def write(name, **changes):
        path = write_recipe(name, output=str(tmp_path / name), **changes)
        return load_recipe(path, registry=registry)

    text = {"name": "x", "text": str(TEXT / "test" / "bible.jsonl"), "length": 4096, "windows": 1}
    plain = {"decompose": "svd", "options": {"rank_multiple": 1}}
    return [
        write("plan", budget={"remove": 0.9, "of": "model"}),
        write("pass", steps=[plain]),
        write("evaluation", evaluate={"perplexity": [{**text, "length": 10**7}]}),
        write("good"),
    ]


@pytest.fixture
def broken(monkeypatch):
    """Plain SVD fails in layer 1."""
    own = mctk_svd.methods()[0].__class__.decompose

    def decompose(self, bank, statistics, size, options):
        if bank.layer == 1:
            raise ZeroDivisionError("no luck")
        return own(self, bank, statistics, size, options)

    monkeypatch.setattr(mctk_svd.methods()[0].__class__, "decompose", decompose)


def test_a_failed_run_stops_no_other(recipes, broken, cache, tmp_path):
    found = run(recipes, load_plugins(), cache=cache, keep_going=True)
    assert [isinstance(f, UserError) for f in found] == [True, True, True, False]
    assert "can be removed by these steps" in str(found[0])
    assert "decompose/svd on experts.gate of layer 1 failed: ZeroDivisionError" in str(found[1])
    [alone] = run(
        [recipes[3].model_copy(update={"output": tmp_path / "alone"})],
        load_plugins(),
        cache=tmp_path / "cache2",
    )
    assert alone["sizes"] == found[3]["sizes"]
    for file in (tmp_path / "good").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes()


def test_what_a_failed_run_had_finished_is_kept(recipes, broken, cache, monkeypatch, tmp_path):
    [found] = run([recipes[1]], load_plugins(), cache=cache, keep_going=True)
    assert isinstance(found, UserError)
    monkeypatch.undo()
    written = (tmp_path / "pass" / "run.log").read_text()
    assert "failed: decompose/svd on experts.gate of layer 1" in written
    run([recipes[1]], load_plugins(), cache=cache)
    assert "going on from layer 1 of 3" in (tmp_path / "pass" / "run.log").read_text()


def test_a_set_that_does_not_keep_going_raises(recipes, broken, cache):
    with pytest.raises(UserError, match="can be removed"):
        run(recipes, load_plugins(), cache=cache)
    with pytest.raises(UserError, match="no luck"):
        run(recipes[1:2] + recipes[3:], load_plugins(), cache=cache)


def test_a_sweep_that_one_runs_needs_break_serves_the_others(recipes, cache, monkeypatch):
    """Forward statistics are taken again for each run by itself."""
    module = importlib.import_module("mctk.engine.run")
    from mctk.statistics import SecondMoment

    calibrate = module.calibrate

    def failing(model, ids, batch, needs, *rest):
        if any(isinstance(need, SecondMoment) for wanted in needs.values() for need in wanted):
            raise UserError("no moment to be had")
        return calibrate(model, ids, batch, needs, *rest)

    monkeypatch.setattr(module, "calibrate", failing)
    found = run([recipes[3], recipes[1]], load_plugins(), cache=cache, keep_going=True)
    assert str(found[0]) == "no moment to be had" and found[1]["gate"]["sizes_equal"]
