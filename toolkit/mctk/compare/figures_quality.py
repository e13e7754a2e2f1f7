"""Loss against size: every method by parameters, and the byte frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import charts
from .charts import Drawing
from .palette import GREY, INK, Look, family_of, is_composed, look_of, looks
from .result import Comparison, Interval
from .standing import Entry, change, entries_of, frontier

EDGE = "#c9ccd1"  # of the frontier
FLOOR = 0.001  # an increase of perplexity below which the axis is linear


@dataclass(frozen=True)
class Point:
    """One entry in a chart.

    Attributes:
        entry: What it stands for.
        size: Share of the original's that it stores.
        lost: Increase of perplexity with its interval, as fractions: exp(Δ log-ppl) - 1.
    """

    entry: Entry
    size: float
    lost: Interval


def points_of(comparison: Comparison, size: Callable[[Entry], float | None]) -> list[Point]:
    """All entries that have a size and a loss."""
    found = []
    for entry in entries_of(comparison.rows):
        lost = change(comparison, entry) if entry.done else None
        share = size(entry)
        if lost is not None and share is not None and math.isfinite(lost.value):
            ends = (lost.value, lost.low, lost.high)
            value, low, high = (None if x is None else math.expm1(min(x, 20.0)) for x in ends)
            assert value is not None
            found.append(Point(entry, share, Interval(value, low, high)))
    return found


def parameters_kept(entry: Entry) -> float | None:
    """Share of the parameters of the budget's scope."""
    scope = entry.row.scope
    if scope is None or scope.unit != "parameters" or not scope.original:
        return None
    return scope.attained / scope.original


def bytes_kept(comparison: Comparison) -> Callable[[Entry], float | None]:
    """Share of all the model's bytes."""
    whole = comparison.original.sizes.bytes
    return lambda entry: entry.row.sizes.bytes / whole if entry.row.sizes else None


def by_parameters(comparison: Comparison) -> Drawing | None:
    """Perplexity lost against stored parameters, a line a method, labelled at its smallest size."""
    points = [
        point
        for point in points_of(comparison, parameters_kept)
        if point.entry.row.budget is not None
    ]
    if not points:
        return None
    known = looks(comparison.rows)
    lines: dict[str, list[Point]] = {}
    for point in points:
        lines.setdefault(point.entry.row.name, []).append(point)
    figure = charts.new(max(5.2, 0.19 * len(lines) + 1.2))
    labels = [line[0].entry.label for line in lines.values()]
    room = charts.text_width(figure, labels, 9) / charts.WIDTH
    axes = figure.add_axes((0.1, 0.11, 0.85 - room, 0.79))
    edge = [points[i] for i in frontier([(p.size, p.lost.value) for p in points])]
    _frontier_line(axes, edge)
    for line in lines.values():
        line.sort(key=lambda point: -point.size)
        look = look_of(line[0].entry.row, known)
        _series(axes, line, look)
    scope = next(p.entry.row.scope.of for p in points if p.entry.row.scope)
    whose = {"experts": "experts' ", "model": "model's ", "targets": "targets' "}[scope]
    axes.set_xlabel(f"share of the {whose}parameters that is stored  (smaller →)")
    _axis_of_loss(axes, points)
    sizes = [point.size for point in points]
    span = max(max(sizes) - min(sizes), 0.05)
    axes.set_xlim(max(sizes) + 0.05 * span, min(sizes) - 0.03 * span)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
    _labels_at_the_end(axes, list(lines.values()), known)
    _legend(figure, known, [p.entry for p in points], "best at its size")
    return charts.finish(
        figure,
        "parameters",
        "Perplexity lost against stored parameters",
        "Further down is better, further right is smaller. A line joins one method's budgets at "
        "the sizes that it attained; its name stands at its smallest. The broad grey line joins "
        "the rows that no other beats in both. Perplexity is the geometric mean over the texts, "
        "against the original's; bars are 95 % intervals from a paired bootstrap over windows. "
        "Rows that are compared by bytes stand in the next figure.",
    )


def by_bytes(comparison: Comparison) -> Drawing | None:
    """Perplexity lost against bytes: what fits into a given memory."""
    points = points_of(comparison, bytes_kept(comparison))
    if not points:
        return None
    known = looks(comparison.rows)
    figure = charts.new(5.8)
    axes = figure.add_axes((0.1, 0.1, 0.88, 0.78))
    edge = [points[i] for i in frontier([(p.size, p.lost.value) for p in points])]
    _frontier_line(axes, edge)
    axes.set_xscale("log")
    shown = [p for p in points if p in edge or _rounds(p)]
    for point in points:
        look = look_of(point.entry.row, known)
        _series(axes, [point], look, faint=point not in shown)
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
            color=look_of(point.entry.row, known).colour,
            fontweight="bold" if point in edge else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        for point in shown
    ]
    rest = [(p.size, p.lost.value) for p in points if p not in shown]
    charts.place_labels(axes, [(p.size, p.lost.value) for p in shown], texts, rest)
    _legend(figure, known, [p.entry for p in points], "byte frontier")
    return charts.finish(
        figure,
        "bytes",
        "The byte frontier: perplexity lost against bytes",
        "Further down is better, further right is smaller; both axes are logarithmic. The broad "
        "grey line is the frontier: at each size the least that is lost. Named are the rows on it "
        "(bold) and all that are rounded; hollow markers are methods whose terms were rounded as "
        "well. Bytes are the payload of the written files, scales and positions included.",
    )


def _rounds(point: Point) -> bool:
    row = point.entry.row
    return is_composed(row) or family_of(row) == "quantize"


def _name(point: Point) -> str:
    budget = point.entry.row.budget
    return point.entry.label + (f" −{100 * budget.remove:g} %" if budget else "")


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


def _axis_of_loss(axes: Any, points: Sequence[Point]) -> None:
    """Increase of perplexity in per cent, logarithmic; linear about 0 where rows lose nothing."""
    lost = [point.lost.value for point in points]
    ends = [x for p in points for x in (p.lost.low, p.lost.high) if x is not None]
    lowest, highest = min(*lost, *ends), max(*lost, *ends)
    if lowest > FLOOR:
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
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:+g} %" if y else "0")
    axes.set_ylabel("increase of perplexity  (better ↓)")


def _percent_axis(axes: Any, low: float, high: float) -> None:
    axes.set_xticks(charts.log_ticks(low * 0.9, high * 1.02, 6))
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")


def _labels_at_the_end(axes: Any, lines: Sequence[list[Point]], known: dict[str, Look]) -> None:
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
    for point, place in zip(ends, places, strict=True):
        look = look_of(point.entry.row, known)
        axes.annotate(
            point.entry.label,
            (point.size, point.lost.value),
            xytext=(1.035, place),
            textcoords="axes fraction",
            fontsize=9,
            color=look.colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": look.colour, "lw": 0.6, "alpha": 0.55,
                "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _legend(figure: Any, known: dict[str, Look], entries: Sequence[Entry], edge: str) -> None:
    from matplotlib.lines import Line2D

    def handle(label: str, colour: str, **style: Any) -> Any:
        return Line2D([], [], label=label, color=colour, **{"markersize": 6, "lw": 1.1, **style})

    present = {family_of(entry.row) for entry in entries}
    handles = [
        handle(family.replace("+", " + "), look.colour, marker=look.marker)
        for family, look in known.items()
        if family in present
    ]
    if any(is_composed(entry.row) for entry in entries):
        hollow = {"marker": "o", "markerfacecolor": "white", "linestyle": (0, (4, 2))}
        handles.append(handle("… then rounded", INK, **hollow))
    handles.append(handle(edge, EDGE, lw=6))
    charts.legend_above(figure, handles, 0.085)
