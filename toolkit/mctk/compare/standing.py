"""How rows stand to each other: seeds taken together, the best of a budget, ties, the frontier.

What is ranked is one number: the mean over the comparison's texts of the change of log-perplexity
against the original. Two entries are tied where a paired bootstrap over the same windows cannot
tell them apart; intervals against the original are no help there, since what makes a window hard
is in both. Letters: N windows of a text, B resamples.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .result import Budget, Comparison, Interval, Original, Row, TextScore

Subject = Row | Original
SAMPLES = 4000  # B
OF = {"model": "the model's", "experts": "the experts'", "targets": "the targets'"}


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
        ranked: Those whose sizes the budget makes comparable. A row whose budget counts bytes may
            store more parameters than a budget of parameters allows.
        best: The lowest score among them; None without a budget, or where nothing has one.
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


def title_of(budget: Budget | None) -> str:
    """A budget in words."""
    if budget is None:
        return "No budget: the size follows from the steps"
    return f"{100 * budget.remove:g} % of {OF[budget.of]} {budget.unit} removed"


def groups_of(comparison: Comparison) -> list[Group]:
    """Every budget's entries, in the order of the file; rows without a budget last."""
    shares = list(dict.fromkeys(budget.remove for budget in comparison.budgets))
    firsts = [next(b for b in comparison.budgets if b.remove == share) for share in shares]
    found = []
    for budget in [*firsts, None]:
        entries = entries_of(comparison.at(budget))
        if entries:
            ranked = [e for e in entries if budget is None or _unit(e) == budget.unit]
            best = None if budget is None else _lowest(comparison, ranked)
            tied = [] if best is None else [e for e in ranked if _tied(comparison, best, e)]
            found.append(
                Group(title_of(budget), budget, tuple(entries), tuple(ranked), best, tuple(tied))
            )
    return found


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
    total, drawn = 0.0, np.zeros(SAMPLES)
    for number, name in enumerate(comparison.texts):
        a, b = _windows(first, name), _windows(second, name)
        if a is None or b is None or a.shape != b.shape:
            return None
        if len({subject.texts[name].digest for subject in (*first, *second)}) > 1:
            return None
        total += float((b - a).mean())
        drawn += _draws(a.size, number) @ (b - a)
    if not comparison.texts:
        return None
    low, high = np.quantile(drawn / len(comparison.texts), [0.025, 0.975])
    return Interval(total / len(comparison.texts), float(low), float(high))


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points nobody beats: no other is as small and as good.

    Args:
        points: Size and loss of each.

    Returns:
        Their positions, from the smallest size up; of equal points the first.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], points[i][1], i))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def _unit(entry: Entry) -> str | None:
    return None if entry.row.budget is None else entry.row.budget.unit


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


@functools.cache
def _draws(windows: int, seed: int) -> np.ndarray:
    """How often each resample takes each window, as shares [B, N]."""
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, windows, size=(SAMPLES, windows))
    shares = np.zeros((SAMPLES, windows))
    np.add.at(shares, (np.arange(SAMPLES)[:, None], drawn), 1 / windows)
    return shares
