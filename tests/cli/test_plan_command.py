"""`mctk plan`: refuses what `run` would refuse, prints what a run will cost, writes nothing."""

from __future__ import annotations

import json
import re

import pytest

from tests.cli.mistakes import damage, each_damage, each_in_recipe, placed


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    import mctk.engine  # noqa: F401 (who imports the function now would keep the refusing one)

    def refuse(*arguments, **settings):
        raise AssertionError("a plan read weights")

    monkeypatch.setattr("safetensors.safe_open", refuse)


def test_a_plan_in_words(mctk, write_recipe, tmp_path):
    code, out, err = mctk("plan", write_recipe())
    assert (code, err) == (0, "")
    assert "mixtral, 3 layers, computed in bfloat16 on cpu" in out
    assert (
        "step 1: decompose/svd_llm on experts.down, experts.gate, experts.up of layers 0-2" in out
    )
    assert "planned (exact)" in out and "active parameters" in out
    assert re.search(r"speed: the experts multiply .* at most 1\.\d\d times as fast as the", out)
    assert "12 sequences of 64 tokens (enough text)" in out
    assert "SecondMoment(experts.gate, input)" in out and "peak memory: about" in out
    assert not (tmp_path / "out").exists()


def test_a_plan_as_json(mctk, write_recipe):
    code, out, err = mctk("plan", write_recipe(), "--json", "--set", "budget.remove=0.2")
    assert (code, err) == (0, "")
    sizes = json.loads(out)["sizes"]
    kept = sizes["planned"]["expert_parameters"] / sizes["original"]["expert_parameters"]
    assert sizes["exact"] and 0.795 <= kept <= 0.8
    speed = json.loads(out)["speed"]  # nothing is shared: the arithmetic falls as the size does
    assert speed["planned_expert_macs"] / speed["expert_macs"] == pytest.approx(kept, abs=1e-3)
    assert speed["bound"] == speed["expert_macs"] / speed["planned_expert_macs"]


def test_removed_experts_make_a_token_no_faster(mctk, write_recipe):
    """No "at most 1.00 times as fast", which says nothing."""
    budget = {"remove": 0.25, "of": "experts"}
    code, out, _ = mctk("plan", write_recipe(steps=[{"prune": "reap"}], budget=budget))
    assert code == 0 and "times as fast" not in out
    assert "a token's experts multiply as often as in the original" in out


@pytest.mark.parametrize(("multiple", "told"), [(1, False), (12, True)])
def test_shares_that_steps_make_uneven_are_told(mctk, write_recipe, multiple, told):
    """Ranks of 12 for matrices of 32 × 24: banks of equal shares are far apart."""
    step = {"decompose": "svd", "options": {"rank_multiple": multiple}}
    code, out, _ = mctk("plan", write_recipe(steps=[step], budget={"remove": 0.3, "of": "experts"}))
    assert code == 0
    assert ("warning: shares are uneven: experts." in out) is told


def test_a_bound_says_that_it_is_one(mctk, write_recipe):
    recipe = write_recipe(allocate={"method": "by_loss"})
    code, out, _ = mctk("plan", recipe)
    assert code == 0
    assert "a bound: the allocator decides by measured errors" in out
    assert "planned (exact)" not in out and "decided by errors" in out
    assert "speed:" not in out


@pytest.mark.parametrize(
    "step", [{"prune": "skip_experts"}, {"merge": "m_smoe", "size": {"rank": 2}}]
)
def test_what_calibration_decides_is_bounded(mctk, write_recipe, step):
    """Whom a token skips, and who shares a group, no header tells."""
    recipe = write_recipe(budget=None, steps=[step])
    sizes = json.loads(mctk("plan", recipe, "--json")[1])["sizes"]
    assert sizes["planned"] and not sizes["exact"]
    assert sizes["at_most"] == ["active_parameters", "macs_per_token"]
    code, out, _ = mctk("plan", recipe)
    assert code == 0 and "(exact)" not in out and "times as fast" not in out
    assert re.search(r"active parameters +\S+ \S+ +≤ ", out)
    assert re.search(r"parameters +\d\S* .? +\d", out)  # what is stored is known
    assert out.count("depends on calibration") == 2


def test_a_run_keeps_what_its_plan_promised(mctk, write_recipe, tmp_path):
    """What a plan promises is what the run of the same recipe writes."""
    recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    planned = json.loads(mctk("plan", recipe, "--json")[1])["sizes"]
    with pytest.MonkeyPatch.context() as patch:
        import safetensors
        from safetensors._safetensors_rust import safe_open

        patch.setattr(safetensors, "safe_open", safe_open)
        metrics = json.loads(mctk("run", recipe, "--quiet", "--json")[1])
    assert metrics["sizes"]["original"] == planned["original"]
    assert metrics["sizes"]["attained"] == planned["planned"]


@each_in_recipe
def test_mistakes_are_found_by_the_plan(
    refused, write_recipe, short, tmp_path, change, written, message
):
    recipe = write_recipe(**change)
    assert placed(recipe, written, message) in refused("plan", recipe)
    assert not (tmp_path / "out").exists()


@each_damage
def test_damaged_models_are_found_by_the_plan(refused, write_recipe, mixtral, tmp_path, how):
    model, message = damage(mixtral, tmp_path / "damaged", how)
    assert message in refused("plan", write_recipe(), "--model", model)


def test_a_missing_recipe(refused, tmp_path):
    path = tmp_path / "none.yaml"
    assert refused("plan", path) == f"Error: {path}: cannot be read: No such file or directory"


def test_a_budget_that_cannot_be_used_up_bounds_the_plan(mctk, write_recipe):
    """What is planned is what the largest sizes come to, and not what the budget would allow."""
    steps = [
        {"prune": "reap", "size": {"keep": 0.5}},
        {"decompose": "svd_llm", "size": "auto"},
        {"quantize": "rtn", "options": {"bits": 8}},
    ]
    budget = {"remove": 0.1, "of": "experts", "unit": "bytes"}
    recipe = write_recipe(steps=steps, budget=budget, allocate={"method": "by_loss"})
    plan = json.loads(mctk("plan", recipe, "--json")[1])
    assert any("cannot be used up" in warning for warning in plan["warnings"])
    assert plan["sizes"]["bound"]["most"] < 0.8 * plan["sizes"]["original"]["bytes"]
