"""Properties of the allocators: the budget holds, uniform is even, by_loss is optimal."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import UserError
from mctk.hookspecs import Method
from mctk.terms import SizeCurve
from mctk_allocate import math, methods
from mctk_allocate.methods import ByLoss, ByLossOptions, ByScore, Uniform
from pydantic import ValidationError


@st.composite
def problems(draw, max_items=4, max_settings=5):
    """Costs, errors (any falling curve, convex or not) and a budget that is feasible."""
    costs, errors = [], []
    for _ in range(draw(st.integers(1, max_items))):
        count = draw(st.integers(1, max_settings))
        cost = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count, unique=True))
        error = draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
        costs.append(sorted(cost))
        errors.append(sorted(error, reverse=True))
    least = sum(cost[0] for cost in costs)
    budget = draw(st.integers(least, sum(cost[-1] for cost in costs) + 5))
    return costs, errors, budget


def best_by_force(costs, errors, budget):
    every = itertools.product(*(range(len(cost)) for cost in costs))
    return min(
        math.total_error(errors, choice)
        for choice in every
        if math.total_cost(costs, choice) <= budget
    )


def smallest_step_left(costs, choice):
    steps = [
        cost[k + 1] - cost[k] for cost, k in zip(costs, choice, strict=True) if k + 1 < len(cost)
    ]
    return min(steps, default=None)


@given(problems())
@settings(deadline=None)
def test_no_allocator_exceeds_the_budget(problem):
    costs, errors, budget = problem
    for choice in (math.uniform(costs, budget), math.by_loss(costs, errors, budget)):
        assert math.total_cost(costs, choice) <= budget
        assert all(0 <= k < len(cost) for k, cost in zip(choice, costs, strict=True))


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_uniform_on_equal_items_differs_by_at_most_one_step(count, steps, fraction):
    cost = list(itertools.accumulate(steps))
    budget = round(count * (cost[0] + fraction * (cost[-1] - cost[0])))
    choice = math.uniform([cost] * count, budget)
    assert max(choice) - min(choice) <= 1
    left = budget - math.total_cost([cost] * count, choice)
    assert left < max(steps) or choice == [len(steps) - 1] * count


def test_uniform_spreads_the_extra_steps_over_the_layers():
    # Ten equal layers, and a budget that pays for five steps more: every other layer gets one.
    cost = list(range(10, 110, 10))
    choice = math.uniform([cost] * 10, 450)
    assert choice == [3, 4] * 5


@given(
    st.lists(st.tuples(st.integers(20, 60), st.integers(1, 9)), min_size=1, max_size=30),
    st.floats(0.15, 1),
)
@settings(deadline=None)
def test_uniform_is_within_one_step_of_the_budget(items, fraction):
    costs = [[step * k for k in range(1, count + 1)] for count, step in items]
    whole = sum(cost[-1] for cost in costs)
    budget = int(fraction * whole)
    choice = math.uniform(costs, budget)
    assert budget - math.total_cost(costs, choice) <= max(step for _, step in items)
    for cost, k in zip(costs, choice, strict=True):
        assert cost[k] <= fraction * cost[-1] + (cost[1] - cost[0]) + 1e-9


def test_uniform_keeps_what_cannot_shrink_and_takes_it_from_the_others():
    # The first item has one size, beyond its share: the second gives up what it takes.
    assert math.uniform([[50], [10, 20, 30, 40, 50]], 60) == [0, 0]
    assert math.uniform([[50], [10, 20, 30, 40, 50]], 75) == [0, 1]


@given(problems())
@settings(deadline=None)
def test_by_loss_equals_brute_force(problem):
    costs, errors, budget = problem
    choice = math.by_loss(costs, errors, budget)
    assert math.total_error(errors, choice) <= best_by_force(costs, errors, budget) + 1e-9


@given(problems(max_items=12, max_settings=8))
@settings(deadline=None)
def test_by_loss_is_never_worse_than_uniform_and_spends_what_fits(problem):
    costs, errors, budget = problem
    choice = math.by_loss(costs, errors, budget)
    even = math.uniform(costs, budget)
    assert math.total_error(errors, choice) <= math.total_error(errors, even) + 1e-9
    step = smallest_step_left(costs, choice)
    assert step is None or budget - math.total_cost(costs, choice) < step


def test_by_loss_knows_that_a_curve_can_end_in_a_cliff():
    # Plain low rank: the last rank still errs, the dense matrix does not. One whole matrix and one
    # at the smallest rank beat two at a middle rank.
    costs = [[10, 20, 30, 40]] * 2
    errors = [[9.0, 8.0, 7.0, 0.0]] * 2
    assert sorted(math.by_loss(costs, errors, 50)) == [0, 3]


def test_by_score_is_one_threshold_where_steps_cost_the_same():
    # What each step takes off: .4 .2 .1, .35 .3 .05; the first expert of each layer is given.
    scores = [[0.7, 0.3, 0.1, 0.0], [0.7, 0.35, 0.05, 0.0]]
    costs = [[5, 10, 15, 20]] * 2
    assert math.by_score(costs, scores, 10) == [0, 0]
    assert math.by_score(costs, scores, 15) == [1, 0]
    assert math.by_score(costs, scores, 20) == [1, 1]
    assert math.by_score(costs, scores, 27) == [1, 2]
    assert math.by_score(costs, scores, 30) == [2, 2]
    assert math.by_score(costs, scores, 35) == [3, 2]
    assert math.by_score(costs, scores, 99) == [3, 3]
    with pytest.raises(math.Infeasible):
        math.by_score(costs, scores, 9)


@given(problems(max_items=6))
@settings(deadline=None)
def test_by_score_spends_what_fits(problem):
    costs, scores, budget = problem
    choice = math.by_score(costs, scores, budget)
    spent = math.total_cost(costs, choice)
    assert spent <= budget
    left = [costs[i][k + 1] - costs[i][k] for i, k in enumerate(choice) if k + 1 < len(costs[i])]
    assert all(step > budget - spent for step in left)


@given(st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=6),
       st.integers(0, 24))  # fmt: skip
@settings(deadline=None)
def test_by_score_reproduces_a_threshold_on_shares(weights, extra):
    """M-SMoE's rule: so many experts in all, those of the largest share, each layer's first in."""
    shares = [sorted((w / sum(row) for w in row), reverse=True) for row in weights]
    scores = [[sum(row[n:]) for n in range(1, 5)] for row in shares]
    wanted = min(4 * len(shares), len(shares) + extra)
    choice = math.by_score([[1, 2, 3, 4]] * len(shares), scores, wanted)
    assert sum(choice) + len(shares) == wanted
    inside = [s for row, k in zip(shares, choice, strict=True) for s in row[1 : k + 1]]
    outside = [s for row, k in zip(shares, choice, strict=True) for s in row[k + 1 :]]
    assert min(inside, default=1) >= max(outside, default=0) - 1e-9


def test_hull_leaves_out_what_no_price_would_buy():
    assert math.hull([1, 2, 3, 4], [9.0, 8.5, 1.0, 1.0]) == [0, 2]
    assert math.hull([1, 2, 3], [4.0, 2.0, 1.0]) == [0, 1, 2]
    assert math.hull([1, 2, 3], [4.0, 2.0, 1.0], start=1) == [1, 2]


@given(problems(), st.floats(0, 1))
@settings(deadline=None)
def test_min_keep_is_a_floor(problem, min_keep):
    costs, errors, budget = problem
    lowest = math.floors(costs, min_keep)
    budget = max(budget, math.total_cost(costs, lowest))
    choice = math.by_loss(costs, errors, budget, lowest)
    assert math.total_cost(costs, choice) <= budget
    for cost, k in zip(costs, choice, strict=True):
        assert cost[k] >= min_keep * cost[-1]


def curves(with_errors=True):
    steep = SizeCurve(
        (0, 0, "a"), (8, 16, -1), (10, 20, 40), (9.0, 1.0, 0.0) if with_errors else None
    )
    flat = SizeCurve(
        (0, 1, "a"), (8, 16, -1), (10, 20, 40), (3.0, 2.9, 0.0) if with_errors else None
    )
    return [steep, flat]


def test_methods_return_an_index_for_every_item():
    assert Uniform().allocate(curves(False), 30, Uniform.Options()) == {
        (0, 0, "a"): 0,
        (0, 1, "a"): 1,
    }
    assert ByLoss().allocate(curves(), 30, ByLossOptions()) == {(0, 0, "a"): 1, (0, 1, "a"): 0}
    assert ByScore().allocate(curves(), 30, ByScore.Options()) == {(0, 0, "a"): 1, (0, 1, "a"): 0}
    assert ByLoss().allocate(curves(), 40, ByLossOptions()) == {(0, 0, "a"): 1, (0, 1, "a"): 1}


def test_the_option_changes_the_outcome():
    assert ByLoss().allocate(curves(), 50, ByLossOptions()) == {(0, 0, "a"): 2, (0, 1, "a"): 0}
    even = ByLoss().allocate(curves(), 50, ByLossOptions(min_keep=0.5))
    assert even == {(0, 0, "a"): 1, (0, 1, "a"): 1}
    with pytest.raises(ValidationError):
        ByLossOptions(min_keep=1.5)


def test_errors_name_the_remedy():
    with pytest.raises(UserError, match=r"layer 0 gives none: use allocate/uniform"):
        ByLoss().allocate(curves(False), 30, ByLossOptions())
    with pytest.raises(UserError, match=r"by_score needs a score .* layer 0 gives none"):
        ByScore().allocate(curves(False), 30, ByScore.Options())
    with pytest.raises(UserError, match=r"leaves 19 .* need 20"):
        ByScore().allocate(curves(), 19, ByScore.Options())
    with pytest.raises(UserError, match=r"leaves 19 .* need 20"):
        Uniform().allocate(curves(False), 19, Uniform.Options())
    with pytest.raises(UserError, match=r"min_keep 0.5 need 40"):
        ByLoss().allocate(curves(), 30, ByLossOptions(min_keep=0.5))


def test_plugin_lists_its_methods():
    found = [(m.stage, m.name) for m in methods()]
    assert {("allocate", name) for name in ("uniform", "by_loss", "by_score")} <= set(found)
    assert all(isinstance(m, Method) for m in methods())
