"""How rows stand to each other: seeds taken together, the best of a budget, ties, the frontier.

What is ranked is one number: the mean over the comparison's texts of the change of log-perplexity
against the original. Two entries are tied where a paired bootstrap over the same windows cannot
tell them apart; intervals against the original are no help there, since what makes a window hard
is in both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluate.bootstrap import bootstrap_mean
from .result import Budget, Comparison, Interval, Original, Row, TextScore

Subject = Row | Original
OF = {"model": "the model's", "experts": "the experts'", "targets": "the targets'"}
NEAR = 0.005  # of the original's size: as far as a budget may be missed (`mctk.planning.TOLERANCE`)


@dataclass(frozen=True)
class Entry:
    """One line of a table: a method at one budget, over all its seeds.

    Attributes:
        rows: One a seed, in order.
    """

    rows: tuple[Row, ...]

    @property
    def done(self) -> list[Row]:
        """Those that have figures."""
        return [row for row in self.rows if row.status == "ok"]

    @property
    def row(self) -> Row:
        """One to speak for all: the first with figures."""
        return next(iter(self.done), self.rows[0])

    @property
    def label(self) -> str:
        """What to call it."""
        return self.row.label

    def mean(self, value: Callable[[Row], float | None]) -> float | None:
        """The mean over seeds; None where a seed that ran has no such figure."""
        found = [value(row) for row in self.done]
        known = [x for x in found if x is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None

    def spread(self, value: Callable[[Row], float | None]) -> float | None:
        """The standard deviation over seeds; None below two."""
        known = [x for row in self.done if (x := value(row)) is not None]
        return statistics.stdev(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Group:
    """The entries of one budget.

    Attributes:
        title: The budget in words.
        budget: None: rows whose size follows from their steps.
        entries: In the order of the file.
        ranked: Those whose sizes the budget makes comparable; none without a budget. A row whose
            budget counts bytes may store more parameters than a budget of parameters allows.
        best: The lowest score among them; None where nothing has one.
        tied: Entries that the windows (or the seeds) cannot tell from the best.
    """

    title: str
    budget: Budget | None
    entries: tuple[Entry, ...]
    ranked: tuple[Entry, ...]
    best: Entry | None
    tied: tuple[Entry, ...]


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    """Rows of one name and budget as one entry, in order of appearance."""
    found: dict[tuple[str, Budget | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.name, row.budget), []).append(row)
    return [Entry(tuple(seeds)) for seeds in found.values()]


def groups_of(comparison: Comparison) -> list[Group]:
    """Every budget's entries, in the order of the file; rows without a budget last.

    Budgets that rows bring along stand behind the comparison's own. Rows in bytes stand with those
    of the same share in parameters.
    """
    own = [row.budget for row in comparison.rows if row.budget is not None]
    found = []
    for budget in _distinct([*comparison.budgets, *own]):
        entries = entries_of(comparison.at(budget))
        if entries:
            found.append(_ranked_group(comparison, budget, entries))
    entries = entries_of(comparison.at(None))
    if entries:
        title = "Sizes that follow from the steps, by bytes"
        found.append(Group(title, None, tuple(entries), (), None, ()))
    return found


def _distinct(budgets: Iterable[Budget]) -> list[Budget]:
    """The first budget of each share."""
    found: dict[tuple[float, str], Budget] = {}
    for budget in budgets:
        found.setdefault((budget.remove, budget.of), budget)
    return list(found.values())


def _ranked_group(comparison: Comparison, budget: Budget, entries: Sequence[Entry]) -> Group:
    """The group of one share, ranked by what its budget counts, or else by what its rows' do."""
    units = {entry.row.budget.unit for entry in entries if entry.row.budget is not None}
    unit = budget.unit if budget.unit in units else next(iter(units))
    ranked = tuple(e for e in entries if e.row.budget is not None and e.row.budget.unit == unit)
    best = _lowest(comparison, ranked)
    tied = [] if best is None else [e for e in ranked if _tied(comparison, best, e)]
    title = f"{100 * budget.remove:g} % of {OF[budget.of]} {unit} removed"
    if len(units) > 1:
        title += " (‡: of their bytes)" if unit == "parameters" else " (others: of parameters)"
    return Group(title, budget, tuple(entries), ranked, best, tuple(tied))


def ordered(comparison: Comparison, group: Group) -> list[Entry]:
    """A group's entries from the best to those without figures; without a budget by bytes."""

    def place(entry: Entry) -> tuple[bool, float]:
        if group.budget is None:
            value = float(entry.row.sizes.bytes) if entry.row.sizes else None
        else:
            value = entry.mean(lambda row: score(comparison, row))
        return value is None, value or 0.0

    return sorted(group.entries, key=place)


def score(comparison: Comparison, row: Row) -> float | None:
    """The mean over texts of the change of log-perplexity; None unless every text has one."""
    changes = [row.texts[name].change for name in comparison.texts if name in row.texts]
    values = [change.value for change in changes if change is not None]
    return statistics.fmean(values) if values and len(values) == len(comparison.texts) else None


def change(comparison: Comparison, subject: Entry) -> Interval | None:
    """An entry's mean change of log-perplexity against the original, with its interval."""
    value = subject.mean(lambda row: score(comparison, row))
    if value is None:
        return None
    if len(subject.done) == 1 and subject.row.overall and subject.row.overall.change:
        return subject.row.overall.change
    paired = difference(comparison, [comparison.original], subject.done)
    return Interval(value, paired.low, paired.high) if paired else Interval(value)


def difference(
    comparison: Comparison, first: Sequence[Subject], second: Sequence[Subject]
) -> Interval | None:
    """Mean log-perplexity over texts of `second` less that of `first`, windows drawn in pairs.

    Seeds are averaged window by window before anything is drawn, so the interval is that of the
    text alone; texts are drawn independently of each other.

    Returns:
        The difference with its 95 % interval; None where windows are missing or not the same.
    """
    paired = []
    for name in comparison.texts:
        a, b = _windows(first, name), _windows(second, name)
        if a is None or b is None or a.shape != b.shape:
            return None
        if len({subject.texts[name].digest for subject in (*first, *second)}) > 1:
            return None
        paired.append((b - a, 1.0))
    return Interval(*bootstrap_mean(paired)) if paired else None


def on_frontier(comparison: Comparison) -> set[str]:
    """Keys of the rows that no other beats in bytes and score."""
    whole = comparison.original.sizes.bytes
    points, keys = [], []
    for entry in entries_of(comparison.rows):
        value = entry.mean(lambda row: score(comparison, row))
        if value is not None and entry.row.sizes is not None:
            points.append((entry.row.sizes.bytes / whole, value))
            keys.append(entry.row.key)
    return {keys[i] for i in frontier(points)}


def frontier(points: Sequence[tuple[float, float]], near: float = NEAR) -> list[int]:
    """Which points are worth their place: smaller than every better one by more than a tolerance.

    A few router rows or positions less are no smaller model, so a point that saves no more than
    that against a better one on the frontier is not on it.

    Args:
        points: Size, as a share of the original's, and loss of each.
        near: The tolerance, a share too.

    Returns:
        Their positions, from the smallest size up; of equal points the first.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0], i)):
        if not found or points[i][0] < points[found[-1]][0] - near:
            found.append(i)
    return found[::-1]


def _lowest(comparison: Comparison, entries: Iterable[Entry]) -> Entry | None:
    scored = [(e.mean(lambda row: score(comparison, row)), e) for e in entries]
    known = [(value, entry) for value, entry in scored if value is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _tied(comparison: Comparison, best: Entry, other: Entry) -> bool:
    """Whether what the other is behind by is within the interval, or within the seeds' spread."""
    if other is best:
        return False
    behind = difference(comparison, best.done, other.done) if other.done else None
    if behind is None or behind.low is None:
        return False
    seeds = [entry.spread(lambda row: score(comparison, row)) or 0.0 for entry in (best, other)]
    return behind.low <= 0 or behind.value <= max(seeds)


def _windows(subjects: Sequence[Subject], name: str) -> np.ndarray | None:
    """Negative log-likelihood a token of each window [N], the mean over seeds."""
    found: list[np.ndarray] = []
    for subject in subjects:
        text = subject.texts.get(name)
        if text is None or not _whole(text):
            return None
        found.append(np.asarray(text.window_nll, dtype=np.float64) * text.windows / text.tokens)
    if not found or len({values.shape for values in found}) > 1:
        return None
    return np.mean(found, axis=0)


def _whole(text: TextScore) -> bool:
    return bool(text.window_nll) and all(
        value is not None and math.isfinite(value) for value in text.window_nll
    )
