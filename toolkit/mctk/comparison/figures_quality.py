"""Loss against size: every method by parameters, and the byte frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import charts
from .charts import Drawing
from .fields import kept
from .notes import BEST, TIED, doubt
from .palette import GREY, INK, ROUNDING, Look, Looks, family_of, is_composed, looks
from .result import Comparison, Interval
from .standing import NEAR, Entry, change, entries_of, frontier, groups_of

EDGE = "#c9ccd1"  # of the frontier
FLOOR = 0.001  # an increase of perplexity below which the axis is linear
LISTED = 12  # methods up to which a legend names them one by one


@dataclass(frozen=True)
class Point:
    """One entry in a chart.

    Attributes:
        entry: What it stands for.
        size: Share of the original's that it stores.
        lost: Increase of perplexity with its interval, as fractions: exp(Δ log-ppl) - 1.
        mark: ★ or ≈ where it is the best of its budget, or not told from that.
    """

    entry: Entry
    size: float
    lost: Interval
    mark: str = ""

    @property
    def by_bytes(self) -> bool:
        """Whether bytes are its size: its budget counts them, or it has none."""
        budget = self.entry.row.budget
        return budget is None or budget.unit == "bytes"


def points_of(comparison: Comparison, size: Callable[[Entry], float | None]) -> list[Point]:
    """All entries that have a size and a loss."""
    marks: dict[str, str] = {}
    for group in groups_of(comparison):
        marks |= {entry.row.key: TIED for entry in group.tied}
        if group.best is not None:
            marks[group.best.row.key] = BEST
    found = []
    for entry in entries_of(comparison.rows):
        lost = change(comparison, entry) if entry.done else None
        share = size(entry)
        if lost is not None and share is not None and math.isfinite(lost.value):
            ends = (lost.value, lost.low, lost.high)
            value, low, high = (None if x is None else math.expm1(min(x, 20.0)) for x in ends)
            assert value is not None
            mark = marks.get(entry.row.key, "")
            found.append(Point(entry, share, Interval(value, low, high), mark))
    return found


def by_parameters(comparison: Comparison) -> Drawing | None:
    """Perplexity lost against stored parameters, a line a method, labelled at its smallest size."""
    share = kept(comparison)
    points = [
        point
        for point in points_of(comparison, lambda entry: share(entry.row))
        if not point.by_bytes
    ]
    if not points:
        return None
    known = looks(comparison.rows)
    lines = list(_lines(points).values())
    figure = charts.new(max(5.2, 0.19 * len(lines) + 1.2))
    room = charts.text_width(figure, [_line_name(line) for line in lines], 9) / charts.WIDTH
    axes = figure.add_axes((0.1, 0.11, 0.85 - room, 0.79))
    _frontier_line(axes, _edge(points))
    for line in lines:
        _series(axes, line, known.of(line[0].entry.row))
    _ring(axes, points)
    of = comparison.budgets[0].of if comparison.budgets else "experts"
    whose = {"experts": "experts' ", "model": "model's ", "targets": "targets' "}[of]
    axes.set_xlabel(f"share of the {whose}parameters that is stored  (smaller →)")
    _axis_of_loss(axes, points)
    sizes = [point.size for point in points]
    span = max(max(sizes) - min(sizes), 0.05)
    axes.set_xlim(max(sizes) + 0.05 * span, min(sizes) - 0.03 * span)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    _labels_at_the_end(axes, lines, known)
    _legend(figure, known, points, "best at its size", methods=False)
    return charts.finish(
        figure,
        "parameters",
        "Perplexity lost against stored parameters",
        "Further down is better, further right is smaller. A line joins one method's budgets at "
        "the sizes that it attained; its name stands at its smallest. A ring, and ★ at the name: "
        "best of its budget; ≈: not told from that at one of its budgets. The broad grey line "
        f"joins the rows that are smaller than every better one by more than {100 * NEAR:g} %. "
        f"{_of_loss(comparison, points)} Rows whose budget counts bytes, and those without one, "
        "stand in the next figure.",
    )


def by_bytes(comparison: Comparison) -> Drawing | None:
    """Perplexity lost against bytes: what fits into a given memory."""
    whole = comparison.original.sizes.bytes
    points = points_of(
        comparison, lambda entry: entry.row.sizes.bytes / whole if entry.row.sizes else None
    )
    if not points:
        return None
    known = looks(comparison.rows)
    figure = charts.new(5.8)
    axes = figure.add_axes((0.1, 0.1, 0.88, 0.78))
    edge = _edge(points)
    _frontier_line(axes, edge)
    axes.set_xscale("log")
    lines = _lines([point for point in points if point.by_bytes])
    shown = [p for p in points if p in edge or _rounds(p) or _named(p, lines)]
    for line in lines.values():
        look = known.of(line[0].entry.row)
        axes.plot(
            [p.size for p in line], [p.lost.value for p in line], color=look.colour,
            linewidth=0.9, alpha=0.5, zorder=2,
        )  # fmt: skip
    for point in points:
        faint = point not in shown and not point.by_bytes
        _series(axes, [point], known.of(point.entry.row), faint)
    _ring(axes, points)
    _axis_of_loss(axes, points)
    sizes = [point.size for point in points]
    axes.set_xlim(max(*sizes, 1.0) * 1.04, min(sizes) * 0.82)
    _percent_axis(axes, min(sizes), max(*sizes, 1.0))
    axes.set_xlabel("share of the model's bytes that is stored, logarithmic  (smaller →)")
    texts = [
        axes.annotate(
            _name(point),
            (point.size, point.lost.value),
            xytext=(8, 5),
            textcoords="offset points",
            fontsize=8.5,
            color=known.of(point.entry.row).colour,
            fontweight="bold" if point in edge else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        for point in shown
    ]
    rest = [(p.size, p.lost.value) for p in points if p not in shown]
    charts.place_labels(axes, [(p.size, p.lost.value) for p in shown], texts, rest)
    _legend(figure, known, points, "byte frontier", methods=True)
    return charts.finish(
        figure,
        "bytes",
        "The byte frontier: perplexity lost against bytes",
        "Further down is better, further right is smaller, logarithmic. The broad grey line is "
        "the frontier: at each size the least that is lost, among rows that are smaller than "
        f"every better one by more than {100 * NEAR:g} % of the original. Named are the rows on "
        "it (bold), all that are rounded, the best of each budget (★, with a ring), and what is "
        "not in the figure before (at its smallest, and where it is best or tied). Hollow "
        "markers are methods whose terms were rounded as well. Bytes are the payload of the "
        f"written files, scales and positions included. {_of_loss(comparison, points)}",
    )


def _of_loss(comparison: Comparison, points: Sequence[Point]) -> str:
    """What the upright axis and the bars are, for captions."""
    said = "Perplexity is the geometric mean over the texts, against the original's, logarithmic"
    if _is_linear(points):
        said += f" but for a linear part below {100 * FLOOR:g} %, where 0 and gains have a place"
    if any(len(point.entry.done) > 1 for point in points):
        said += "; points are means over seeds"
    said += ". Bars are 95 % intervals from a paired bootstrap over windows"
    few = doubt(comparison)
    return f"{said}: {few}." if few else f"{said}."


def _lines(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Each method's points, from the largest down."""
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.entry.row.name, []).append(point)
    for line in lines.values():
        line.sort(key=lambda point: -point.size)
    return lines


def _line_name(line: Sequence[Point]) -> str:
    """A method's label, with ★ or ≈ if it is best of a budget, or tied."""
    marks = {point.mark for point in line} - {""}
    mark = BEST if BEST in marks else TIED if marks else ""
    return line[-1].entry.label + (f" {mark}" if mark else "")


def _edge(points: Sequence[Point]) -> list[Point]:
    return [points[i] for i in frontier([(p.size, p.lost.value) for p in points])]


def _rounds(point: Point) -> bool:
    row = point.entry.row
    return is_composed(row) or family_of(row) == ROUNDING


def _named(point: Point, lines: dict[str, list[Point]]) -> bool:
    """Whether a point that is neither rounded nor on the frontier has a name among the bytes."""
    line = lines.get(point.entry.row.name)
    if line is None or not point.by_bytes:
        return point.mark == BEST
    return bool(point.mark) or point is line[-1]


def _name(point: Point) -> str:
    budget = point.entry.row.budget
    mark = f"{point.mark} " if point.mark else ""
    return mark + point.entry.label + (f" −{100 * budget.remove:g} %" if budget else "")


def _ring(axes: Any, points: Sequence[Point]) -> None:
    """A ring about the best of each budget."""
    best = [point for point in points if point.mark == BEST]
    axes.plot(
        [p.size for p in best], [p.lost.value for p in best], linestyle="none", marker="o",
        markersize=12, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.0, zorder=4,
    )  # fmt: skip


def _series(axes: Any, line: Sequence[Point], look: Look, faint: bool = False) -> None:
    """One method's points with intervals, joined."""
    x = [point.size for point in line]
    y = [point.lost.value for point in line]
    if all(p.lost.low is not None and p.lost.high is not None for p in line):
        below = [max(0.0, p.lost.value - (p.lost.low or 0.0)) for p in line]
        above = [max(0.0, (p.lost.high or 0.0) - p.lost.value) for p in line]
        axes.errorbar(
            x, y, yerr=[below, above], fmt="none", ecolor=look.colour, elinewidth=0.9,
            alpha=0.25 if faint else 0.6, zorder=2,
        )  # fmt: skip
    axes.plot(
        x, y, color=look.colour, marker=look.marker, markersize=8 if look.marker == "*" else 5.5,
        markerfacecolor=look.colour if look.filled else "white", markeredgewidth=1.1,
        markeredgecolor=look.colour, linewidth=1.1, alpha=0.35 if faint else 1.0,
        linestyle="-" if look.filled else (0, (4, 2)), zorder=2 if faint else 3,
    )  # fmt: skip


def _frontier_line(axes: Any, edge: Sequence[Point]) -> None:
    """A staircase: between two sizes the smaller one is what fits."""
    if edge:
        axes.step(
            [p.size for p in edge], [p.lost.value for p in edge], where="post",
            color=EDGE, linewidth=7, alpha=0.8, zorder=1, solid_capstyle="round",
        )  # fmt: skip


def _range_of_loss(points: Sequence[Point]) -> tuple[float, float]:
    """From the lowest to the highest end of an interval."""
    every = [x for p in points for x in (p.lost.value, p.lost.low, p.lost.high) if x is not None]
    return min(every), max(every)


def _is_linear(points: Sequence[Point]) -> bool:
    """Whether the axis of loss needs a linear part about 0: a row loses nothing, or hardly."""
    return _range_of_loss(points)[0] <= FLOOR


def _axis_of_loss(axes: Any, points: Sequence[Point]) -> None:
    """Increase of perplexity in per cent, logarithmic; linear about 0 where rows lose nothing."""
    lowest, highest = _range_of_loss(points)
    if not _is_linear(points):
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.2, highest * 1.2)
        shown = charts.log_ticks(lowest / 1.2, highest * 1.2, 6)
    else:
        axes.set_yscale("symlog", linthresh=FLOOR, linscale=0.4)
        highest = max(highest, 2 * FLOOR) * 1.3
        axes.set_ylim(min(1.5 * lowest, -0.3 * FLOOR), highest)
        shown = [0.0, *charts.log_ticks(FLOOR, highest, 6)]
        if 1.5 * lowest < -FLOOR:
            shown += [-tick for tick in charts.log_ticks(FLOOR, -1.5 * lowest, 2)]
    axes.set_yticks(shown)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(_signed)
    axes.set_ylabel("increase of perplexity  (better ↓)")


def _signed(share: float, position: int) -> str:
    return f"{100 * share:+g} %".replace("-", "−") if share else "0"


def _percent_axis(axes: Any, low: float, high: float) -> None:
    axes.set_xticks(charts.log_ticks(low * 0.9, high * 1.02, 6))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")


def _labels_at_the_end(axes: Any, lines: Sequence[list[Point]], known: Looks) -> None:
    """Names in a column on the right, joined to the last point of their lines."""
    figure = axes.figure
    height = axes.get_window_extent().height
    ends = [line[-1] for line in lines]
    positions = [axes.transData.transform((p.size, p.lost.value))[1] for p in ends]
    bottom = axes.get_window_extent().y0
    gap = 12.0 * figure.dpi / 72
    places = charts.spread_out(
        [(y - bottom) / height for y in positions], gap / height, -0.03, 1.04
    )
    for line, place in zip(lines, places, strict=True):
        point = line[-1]
        look = known.of(point.entry.row)
        name = _line_name(line)
        axes.annotate(
            name,
            (point.size, point.lost.value),
            xytext=(1.035, place),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold" if name.endswith(BEST) else "normal",
            color=look.colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": look.colour, "lw": 0.6, "alpha": 0.55,
                "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _legend(figure: Any, known: Looks, points: Sequence[Point], edge: str, methods: bool) -> None:
    """What colours, markers, rings and the broad line mean.

    Args:
        figure: Matplotlib's.
        known: The rows' looks.
        points: What is drawn.
        edge: What the broad line is.
        methods: Whether to name methods that have colours of their own; else they are named beside.
    """
    from matplotlib.lines import Line2D

    def handle(label: str, colour: str, **style: Any) -> Any:
        return Line2D([], [], label=label, color=colour, **{"markersize": 6, "lw": 1.1, **style})

    rows = [point.entry.row for point in points]
    present = dict.fromkeys(known.rows[row.key] for row in rows)
    handles = []
    if known.families:
        families = dict.fromkeys(family_of(row) for row in rows)
        handles = [
            handle(family.replace("+", " + "), known.families[family], lw=3)
            for family in families
            if family in known.families
        ]
        listed = [method for method in present if method == ROUNDING]
    else:
        listed = list(present) if methods and len(present) <= LISTED else []
    for method in listed:
        look = known.methods[method]
        handles.append(handle(known.labels[method], look.colour, marker=look.marker))
    if any(is_composed(row) for row in rows):
        hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": (0, (4, 2))}
        handles.append(handle("… then rounded", INK, **hollow))
    if any(point.mark == BEST for point in points):
        ring = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
        handles.append(handle("best of its budget", INK, **ring))
    handles.append(handle(edge, EDGE, lw=6))
    charts.legend_above(figure, handles, 0.085)
