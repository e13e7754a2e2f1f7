"""Seeds together, the best of a budget, ties by windows, the frontier."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from comparison_factory import TEXTS, comparison
from hypothesis import given
from hypothesis import strategies as st
from mctk.comparison.charts import log_ticks, spread_out
from mctk.comparison.result import Budget
from mctk.comparison.standing import (
    NEAR,
    Entry,
    change,
    difference,
    entries_of,
    frontier,
    groups_of,
    score,
)
from mctk.planning import TOLERANCE


@pytest.fixture(scope="module")
def found():
    return comparison(structure=False)


def test_groups_follow_the_file_and_end_without_a_budget(found):
    titles = [group.title for group in groups_of(found)]
    assert titles[:3] == [f"{p} % of the experts' parameters removed" for p in (20, 40, 60)]
    assert "follow from the steps" in titles[3]
    assert sum(len(group.entries) for group in groups_of(found)) == len(found.rows)


def test_the_best_has_the_lowest_score(found):
    for group in groups_of(found)[:3]:
        scores = [score(found, entry.row) for entry in group.entries if entry.done]
        assert score(found, group.best.row) == min(scores)
    assert groups_of(found)[3].best is None  # sizes of their own: nothing to be best of


def test_a_missing_text_is_no_score(found):
    row = found.rows[0]
    texts = {name: text for name, text in row.texts.items() if name != "code"}
    assert score(found, dataclasses.replace(row, texts=texts)) is None


def test_the_interval_holds_the_mean_change(found):
    entry = Entry((found.rows[0],))
    interval = change(found, entry)
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(score(found, found.rows[0]))


def nudged(found, row, shift, noise, seed=1):
    """The row as if its windows' log-likelihoods were moved."""
    rng = np.random.default_rng(seed)
    texts = {}
    for name, text in row.texts.items():
        moved = np.asarray(text.window_nll) + 511 * (shift + noise * rng.normal(size=text.windows))
        nll = float(moved.sum()) / text.tokens
        before = found.original.texts[name].nll
        texts[name] = dataclasses.replace(
            text,
            nll=nll,
            perplexity=math.exp(nll),
            window_nll=moved.tolist(),
            change=dataclasses.replace(text.change, value=nll - before),
        )
    return dataclasses.replace(row, name="nudged", label="nudged", key="nudged", texts=texts)


def test_what_windows_cannot_tell_apart_is_tied(found):
    best = groups_of(found)[1].best.row
    noise = nudged(found, best, 0.0005, 0.01)
    worse = nudged(found, best, 0.01, 0.01)
    for other, tied in ((noise, True), (worse, False)):
        both = dataclasses.replace(found, rows=[best, other])
        group = groups_of(both)[0]
        named = [entry.label for entry in (*group.tied, group.best)]
        assert bool(group.tied) == tied and ("nudged" in named) == tied


def test_other_tokens_are_not_compared(found):
    a, b = found.rows[0], found.rows[1]
    name = next(iter(TEXTS))
    other = {**b.texts, name: dataclasses.replace(b.texts[name], digest="other")}
    assert difference(found, [a], [b]) is not None
    assert difference(found, [a], [dataclasses.replace(b, texts=other)]) is None


def test_windows_that_are_not_finite_are_not_compared(found):
    row = found.rows[0]
    name = next(iter(TEXTS))
    broken = [None, *row.texts[name].window_nll[1:]]
    texts = {**row.texts, name: dataclasses.replace(row.texts[name], window_nll=broken)}
    assert difference(found, [row], [dataclasses.replace(row, texts=texts)]) is None


def test_seeds_are_one_entry_with_mean_and_spread():
    found = comparison(tasks=False, speed=False, structure=False, seeds=3)
    entry = entries_of(found.at(found.budgets[0]))[0]
    values = [score(found, row) for row in entry.rows]
    assert len(values) == 3
    assert entry.mean(lambda row: score(found, row)) == pytest.approx(np.mean(values))
    assert entry.spread(lambda row: score(found, row)) == pytest.approx(np.std(values, ddof=1))


def test_budgets_that_rows_bring_along_have_groups(found):
    """Recipes that keep their own budgets, and rows of another share or scope."""
    own = Budget(0.3, "model")
    rows = [found.rows[0], dataclasses.replace(found.rows[1], budget=own, key="own")]
    for budgets in (found.budgets, []):
        groups = groups_of(dataclasses.replace(found, rows=rows, budgets=budgets))
        assert [group.title for group in groups] == [
            "20 % of the experts' parameters removed",
            "30 % of the model's parameters removed",
        ]
        assert [group.best.row.key for group in groups] == [row.key for row in rows]


def test_rows_in_bytes_are_ranked_among_their_like(found):
    budget = found.budgets[1]
    rows = [row for row in found.rows if row.budget == budget and row.status == "ok"]
    in_bytes = dataclasses.replace(budget, unit="bytes")
    best = groups_of(dataclasses.replace(found, rows=rows))[0].best.row
    mixed = [dataclasses.replace(r, budget=in_bytes if r is best else budget) for r in rows]
    [group] = groups_of(dataclasses.replace(found, rows=mixed))
    assert group.best.row.key != best.key and len(group.entries) == len(group.ranked) + 1
    assert group.title.endswith("parameters removed (‡: of their bytes)")
    every = [dataclasses.replace(row, budget=in_bytes) for row in rows]
    [group] = groups_of(dataclasses.replace(found, rows=every))
    assert group.best.row.key == best.key and group.title.endswith("bytes removed")


def test_the_tolerance_of_the_frontier_is_the_budgets():
    assert NEAR == TOLERANCE


def test_a_few_rows_of_a_router_earn_no_place_on_the_frontier():
    points = [(0.7496, 0.091), (0.75, 0.010), (0.6, 0.2), (0.6, 0.2), (0.9, 0.001)]
    assert frontier(points) == [2, 1, 4]
    chain = [(0.5 + 0.004 * i, 1 - 0.1 * i) for i in range(5)]  # each near the next
    assert frontier(chain) == [0, 2, 4]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_nobody_beats_the_frontier(points):
    points = [(float(x), float(y)) for x, y in points]
    edge = frontier(points)
    for i, (x, y) in enumerate(points):
        beaten = any(
            a <= x and b <= y and (a, b) != (x, y) for j, (a, b) in enumerate(points) if j != i
        )
        first = points.index((x, y)) == i
        assert (i in edge) == (not beaten and first)
    assert [points[i][0] for i in edge] == sorted({points[i][0] for i in edge})


@given(
    st.lists(st.floats(-1, 2), min_size=1, max_size=30),
    st.floats(0.001, 0.2),
)
def test_labels_are_spread_out_in_order(wanted, gap):
    places = spread_out(wanted, gap, 0.0, 1.0)
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for low, high in itertools.pairwise(order):
        assert places[high] - places[low] >= gap - 1e-9


def test_labels_with_room_stay_where_they_are_wanted():
    assert spread_out([0.1, 0.9, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.1, 0.9, 0.5])
    assert spread_out([], 0.1, 0.0, 1.0) == []


@given(st.floats(1e-4, 1e3), st.floats(1.3, 1e6))
def test_logarithmic_ticks_lie_within(low, factor):
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * factor for tick in ticks)
    assert len(ticks) >= 1 or factor < 2
