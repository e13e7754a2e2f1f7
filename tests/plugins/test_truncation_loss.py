"""Properties of SVD-LLM V2's allocation, and its guards."""

from __future__ import annotations

import math
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.engine import run
from mctk.errors import UserError
from mctk.hookspecs import Method
from mctk.planning import make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.terms import SizeCurve
from mctk_allocate.math import Infeasible
from mctk_allocate.truncation import (
    TruncationLoss,
    TruncationLossOptions,
    inverse_log,
    settings_for,
)
from tiny_run import cache, mixtral, write_recipe  # noqa: F401

LOSSES = st.lists(st.floats(3.0, 1e8), min_size=1, max_size=12)


def curve(layer, bank, loss, size=1000, steps=10):
    """Cost and squared loss, so that half the size leaves `loss`."""
    cost = tuple(size * (k + 1) // steps for k in range(steps))
    half = cost.index(size // 2)
    raw = (*(loss**2 * 2.0 ** (half - k) for k in range(steps - 1)), 0.0)
    settings = (*range(1, steps), -1)
    return SizeCurve((0, layer, bank), settings, cost, error=raw, raw=raw)


@given(LOSSES, st.floats(0.01, 0.9), st.integers(0, 10**6))
@settings(deadline=None)
def test_the_mean_share_is_the_ratio(losses, ratio, seed):
    sizes = [1 + (seed * (i + 7)) % 1000 for i in range(len(losses))]
    shares = inverse_log(losses, sizes, ratio, [0.95] * len(losses))
    total = sum(p * r for p, r in zip(sizes, shares, strict=True))
    assert total == pytest.approx(ratio * sum(sizes), rel=1e-9)
    assert all(0 <= share <= 0.95 + 1e-12 for share in shares)


@given(LOSSES, st.floats(0.01, 0.3))
@settings(deadline=None)
def test_larger_losses_are_removed_less_of(losses, ratio):
    shares = inverse_log(losses, [1] * len(losses), ratio, [1.0] * len(losses))
    for a, x in zip(losses, shares, strict=True):
        for b, y in zip(losses, shares, strict=True):
            assert a <= b or x <= y + 1e-12


def test_the_printed_rule_where_its_guards_are_idle():
    losses, ratio = [10.0, 100.0, 1000.0], 0.2
    weights = [1 / math.log(loss) for loss in losses]
    expected = [3 * ratio * w / sum(weights) for w in weights]
    assert inverse_log(losses, [5, 5, 5], ratio, [1.0] * 3) == pytest.approx(expected)
    assert inverse_log([7.0] * 4, [1, 2, 3, 4], 0.3, [1.0] * 4) == pytest.approx([0.3] * 4)
    # The unit of the activations matters to it, the base of the logarithm does not.
    scaled = inverse_log([10 * loss for loss in losses], [5, 5, 5], ratio, [1.0] * 3)
    assert scaled != pytest.approx(expected, rel=1e-3)


def test_shares_above_what_can_be_removed_go_to_the_others():
    losses = [1e3, 1e4, 1e5, 1e7]
    free = inverse_log(losses, [1] * 4, 0.8, [10.0] * 4)
    assert max(free) > 1  # as printed
    shares = inverse_log(losses, [1] * 4, 0.8, [0.9] * 4)
    assert max(shares) == 0.9 and mean(shares) == pytest.approx(0.8)
    assert inverse_log(losses, [1] * 4, 0.9, [0.9] * 4) == pytest.approx([0.9] * 4)


def test_losses_that_the_rule_cannot_take():
    for least in (0.5, 1.0, math.e):
        with pytest.raises(ValueError, match="losses above e"):
            inverse_log([10.0, least], [1, 1], 0.2, [1.0, 1.0])
    curves = [curve(0, "mlp.up", 50.0), curve(1, "mlp.up", 2.0)]
    with pytest.raises(UserError, match=r"mlp.up of layer 1 loses 2 .* calibrate on more text"):
        TruncationLoss().allocate(curves, 1000, TruncationLossOptions())
    TruncationLoss().allocate(curves, 1000, TruncationLossOptions(rule="marginal"))


def shares(curves, budget, **options):
    found = TruncationLoss().allocate(curves, budget, TruncationLossOptions(**options))
    assert sum(c.cost[found[c.item]] for c in curves) <= budget
    return {c.item: c.cost[found[c.item]] / c.cost[-1] for c in curves}


def test_types_do_not_mix():
    """The down matrices lose a thousand times more, and still give up as much."""
    curves = [curve(layer, "mlp.up", 10.0 * (layer + 1), steps=100) for layer in range(4)]
    curves += [curve(layer, "mlp.down", 1e4 * (layer + 1), steps=100) for layer in range(4)]
    budget = 4000
    found = shares(curves, budget)
    for bank in ("mlp.up", "mlp.down"):
        own = [share for (_, _, name), share in found.items() if name == bank]
        assert mean(own) == pytest.approx(0.5, abs=0.01)
        assert own == sorted(own) and own[0] < own[-1]
    pooled = shares(curves, budget, rule="marginal")
    downs = [share for (_, _, name), share in pooled.items() if name == "mlp.down"]
    assert mean(downs) > 0.55


@given(
    st.lists(st.floats(3.0, 1e6), min_size=2, max_size=10),
    st.floats(0.15, 0.95),
    st.integers(2, 20),
)
@settings(deadline=None)
def test_the_budget_is_met_within_a_step(losses, keep, pairs):
    steps = 2 * pairs
    curves = [curve(i, "mlp.up", x, size=steps * 10, steps=steps) for i, x in enumerate(losses)]
    budget = int(keep * sum(c.cost[-1] for c in curves))
    if budget < sum(c.cost[0] for c in curves):
        return
    try:
        found = shares(curves, budget)
    except UserError as error:
        assert "1 / log" in str(error)  # the loss at a size that is nearly the whole
        return
    spent = sum(share * steps * 10 for share in found.values())
    assert budget - spent < 10 or all(share == 1.0 for share in found.values())


def test_rounding_goes_to_the_furthest_below():
    costs = [[10, 20, 30], [10, 20, 30], [10, 20, 30]]
    assert settings_for(costs, [19.0, 18.0, 23.0], 60) == [1, 1, 1]
    assert settings_for(costs, [20.0, 20.0, 20.0], 60) == [1, 1, 1]
    assert settings_for(costs, [5.0, 20.0, 20.0], 50) == [0, 1, 1]
    with pytest.raises(Infeasible):
        settings_for(costs, [1.0] * 3, 29)


def test_a_run_hands_it_losses_over_all_tokens(write_recipe, cache, monkeypatch):  # noqa: F811
    """In the method's own unit, beside the common one."""
    seen = []
    own = TruncationLoss.allocate

    def spy(self, curves, budget, options):
        seen.append(curves)
        return own(self, curves, budget, options)

    monkeypatch.setattr(TruncationLoss, "allocate", spy)
    registry = load_plugins()
    allocate = {"method": "truncation_loss", "options": {"rule": "marginal"}}
    path = write_recipe(allocate=allocate)
    recipe = load_recipe(path, registry=registry)
    make_plan(recipe, registry)
    assert all(c.raw is None for c in seen.pop())
    [metrics] = run([recipe], registry, cache=cache)
    (curves,) = [c for c in seen if c[0].raw is not None]
    assert metrics["budget"]["attained"] <= metrics["budget"]["allowed"]
    for c in curves:
        rates = {e / r for e, r in zip(c.error, c.raw, strict=True) if r}
        assert max(rates) == pytest.approx(min(rates), rel=1e-6)
    assert len({round(c.error[0] / c.raw[0], 12) for c in curves}) > 1
    assert issubclass(TruncationLoss, Method)
