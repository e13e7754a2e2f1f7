"""What rows did to each layer: errors after every pass, and the sizes that were chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import charts
from .charts import Drawing
from .palette import PALE
from .result import BankSize, Comparison, Row
from .standing import Group, groups_of

NUMBERS = 10  # layers up to which a cell bears its number
LABEL = 8.5  # points
EXACT = 1e-9  # an error below which nothing but rounding is left
DEPTH = 1e-5  # of the largest error: the lightest colour of a logarithmic scale
STORED = "as stored"  # the trace's last step
ERROR = "error of the layer's output (logarithmic)"


@dataclass(frozen=True)
class Line:
    """One line of a heat map.

    Attributes:
        name: What stands before it.
        panels: By panel, a value and a text for each layer.
        first: Whether a block begins with it.
    """

    name: str
    panels: Sequence[dict[int, tuple[float, str]]]
    first: bool = False


def layer_errors(comparison: Comparison) -> Drawing | None:
    """Relative squared error of every layer's output as stored: rows × layers, a panel a budget."""
    groups = groups_of(comparison)
    names = _names(groups)
    lines = []
    for name, label in names.items():
        panels = []
        for group in groups:
            row = _row(group, name)
            last = {point.layer: point.error for point in row.trace} if row else {}
            panels.append({layer: (error, _short(error)) for layer, error in last.items()})
        lines.append(Line(label, panels))
    lines = [line for line in lines if any(line.panels)]
    if not lines:
        return None
    budgets = [i for i, group in enumerate(groups) if group.budget is not None]
    lines.sort(key=lambda line: _place(line, budgets, comparison.model.layers))
    figure = _heat_map(lines, [_heading(group) for group in groups], ERROR, True)
    return charts.finish(
        figure,
        "layer_errors",
        "Error of each layer's output",
        "Relative squared error of a layer's output on its own calibration inputs, as stored; a "
        "column a layer, a panel a budget, rows from the least error to the largest. Darker is "
        "worse; empty is a layer that was left alone. Each layer is fed by the original model, in "
        "rows that were calibrated on their compressed prefix (§) as well, so errors do not add up "
        "along a row.",
    )


def pass_errors(comparison: Comparison) -> Drawing | None:
    """Errors after each pass of the rows that have several."""
    groups = [group for group in groups_of(comparison) if group.budget is not None]
    lines = []
    for name, label in _names(groups).items():
        rows = [_row(group, name) for group in groups]
        steps = list(dict.fromkeys(p.step for row in rows if row for p in row.trace))
        if len([step for step in steps if step != STORED]) < 2:
            continue
        for number, step in enumerate(steps):
            panels = [
                {p.layer: (p.error, _short(p.error)) for p in row.trace if p.step == step}
                if row
                else {}
                for row in rows
            ]
            what = step.split("/")[-1]
            lines.append(Line(what if number else f"{label}: {what}", panels, not number))
    if not lines:
        return None
    figure = _heat_map(lines, [_heading(group) for group in groups], ERROR, True)
    return charts.finish(
        figure,
        "pass_errors",
        "Error after each pass",
        "What each pass of a row with several leaves of a layer's output, from the first pass to "
        "the files: the line where a block darkens is the pass that costs.",
    )


def ranks(comparison: Comparison) -> Drawing | None:
    """Ranks per layer and bank of the rows that store low-rank terms."""
    groups = [group for group in groups_of(comparison) if group.budget is not None]
    lines = []
    for name, label in _names(groups).items():
        rows = [_row(group, name) for group in groups]
        found = [[(b, _rank(b)) for b in row.banks] if row else [] for row in rows]
        banks = dict.fromkeys(b.bank for pairs in found for b, rank in pairs if rank)
        for number, bank in enumerate(banks):
            panels = [_ranks_of(bank, pairs) for pairs in found]
            part = bank.removeprefix("experts.")
            lines.append(Line(part if number else f"{label}: {part}", panels, not number))
    if not lines:
        return None
    figure = _heat_map(
        lines, [_heading(group) for group in groups], "share of the bank's parameters kept", False
    )
    return charts.finish(
        figure,
        "ranks",
        "Chosen ranks",
        "The rank that each bank of each layer got (the number, where there is room for it) and "
        "the share of the bank's parameters that is stored then (the colour; darker is more); "
        '"all" is a bank that was left whole. A row of one colour was shared out evenly.',
    )


def _names(groups: Sequence[Group]) -> dict[str, str]:
    return {entry.row.name: entry.label for group in groups for entry in group.entries}


def _row(group: Group, name: str) -> Row | None:
    return next((e.row for e in group.entries if e.row.name == name and e.done), None)


def _ranks_of(bank: str, pairs: Sequence[tuple[BankSize, str]]) -> dict[int, tuple[float, str]]:
    """Layer → share kept and rank of one bank; "all" in layers where others were rewritten."""
    ranked = {
        b.layer: (b.parameters / b.original, rank)
        for b, rank in pairs
        if b.bank == bank and rank and b.original
    }
    if not ranked:
        return {}
    return {b.layer: (1.0, "all") for b, _ in pairs} | ranked


def _rank(bank: BankSize) -> str:
    """The rank of a bank's first low-rank term; nothing where it has none."""
    found = re.search(r"\blowrank\b[^+]*?\br=(\d+)", bank.summary)
    return found[1] if found else ""


def _heading(group: Group) -> str:
    return f"{100 * group.budget.remove:g} % removed" if group.budget else "own sizes"


def _short(value: float) -> str:
    """Two figures without a leading zero: .052, 1.3, 4e-5."""
    if not math.isfinite(value):
        return "—"
    if abs(value) < EXACT:
        return "0"
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:#.2g}" if abs(value) < 10 else f"{value:.0f}"
    return text.removeprefix("0") if text.startswith("0.") else text


def _place(line: Line, budgets: Sequence[int], layers: int) -> tuple[bool, float]:
    """What lines are sorted by: the mean error at the first budget; without a budget last."""
    known = [[value for value, _ in panel.values()] for panel in line.panels]
    first = next((i for i in budgets if known[i]), None)
    values = known[first] if first is not None else [v for panel in known for v in panel]
    return first is None, sum(values) / layers if values else math.inf


def _heat_map(lines: Sequence[Line], headings: Sequence[str], what: str, logarithmic: bool) -> Any:
    """Lines × layers, one panel beside the other, numbers in the cells where they fit."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    layers = sorted({layer for line in lines for panel in line.panels for layer in panel})
    used = [i for i in range(len(headings)) if any(line.panels[i] for line in lines)]
    values = [
        value
        for line in lines
        for panel in line.panels
        for value, _ in panel.values()
        if math.isfinite(value) and (value > 0 or not logarithmic)
    ]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if logarithmic:
        low = max(low, high * DEPTH)
    if low == high:
        low, high = (low / 2, high * 2) if logarithmic else (low - 0.5, high + 0.5)
    norm = LogNorm(low, high) if logarithmic else Normalize(0.0, max(1.0, high))
    height = 0.2 * len(lines) + 1.25
    figure = charts.new(height)
    left = charts.text_width(figure, [line.name for line in lines], LABEL) + 0.15
    gap = 0.12
    width = min((charts.WIDTH - left - 0.1 - gap * (len(used) - 1)) / len(used), 0.62 * len(layers))
    numbers = width / len(layers) > 0.3 and len(layers) <= NUMBERS
    picture = None
    for place, i in enumerate(used):
        bottom = 0.75 / height
        x = left + place * (width + gap)
        axes = figure.add_axes(
            (x / charts.WIDTH, bottom, width / charts.WIDTH, (height - 1.05) / height)
        )
        grid = np.full((len(lines), len(layers)), np.nan)
        for y, line in enumerate(lines):
            for layer, (value, _) in line.panels[i].items():
                bounded = max(value, low) if logarithmic else value
                grid[y, layers.index(layer)] = bounded
        axes.set_facecolor("#f3f4f5")
        picture = charts.cells(axes, grid, cmap="YlGnBu", norm=norm)
        for y in (y for y, line in enumerate(lines) if line.first and y):
            axes.axhline(y, color="white", linewidth=4)
        axes.set_title(headings[i], fontsize=9.5, pad=4)
        every = max(1, math.ceil(len(layers) * 0.24 / width))
        axes.set_xticks([k + 0.5 for k in range(0, len(layers), every)])
        axes.set_xticklabels([str(layers[k]) for k in range(0, len(layers), every)], fontsize=LABEL)
        axes.set_yticks([k + 0.5 for k in range(len(lines))])
        axes.set_yticklabels([line.name for line in lines] if place == 0 else [], fontsize=LABEL)
        if numbers:
            for y, line in enumerate(lines):
                for layer, (value, text) in line.panels[i].items():
                    ink = charts.ink_on(picture.cmap(norm(max(value, low))))
                    axes.text(
                        layers.index(layer) + 0.5, y + 0.52, text, ha="center", va="center",
                        fontsize=7.5, color=ink,
                    )  # fmt: skip
    figure.text(left / charts.WIDTH, 0.42 / height, "layer", fontsize=LABEL, va="center")
    bar = figure.add_axes((left / charts.WIDTH, 0.24 / height, 2.4 / charts.WIDTH, 0.1 / height))
    figure.colorbar(picture, cax=bar, orientation="horizontal")
    bar.minorticks_off()
    bar.tick_params(labelsize=8, length=2, color=PALE)
    if not logarithmic:
        bar.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g} %")
    bar.grid(False)
    figure.text((left + 2.55) / charts.WIDTH, 0.29 / height, what, fontsize=LABEL, va="center")
    return figure
