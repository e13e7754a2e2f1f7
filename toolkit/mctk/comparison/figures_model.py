"""What the original model is like: spectra, experts' similarity, routing by domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import charts
from .charts import Drawing
from .palette import COLOURS, GREY
from .result import Comparison

SMALL = 8.5  # points
MAPS = 8  # heat maps of layers at most: evenly chosen beyond


def spectra(comparison: Comparison) -> Drawing | None:
    """Energy that the best rank-r approximation keeps: experts against what a base leaves."""
    found = (comparison.structure or {}).get("spectra")
    if not found or not found["banks"]:
        return None
    grid = found["grid"]
    banks = list(found["banks"].items())
    figure = charts.new(3.6)
    left, gap, bottom, height = 0.075, 0.05, 0.16, 0.66
    width = (0.975 - left - gap * (len(banks) - 1)) / len(banks)
    deltas, experts = COLOURS[1], COLOURS[0]
    for number, (bank, layers) in enumerate(banks):
        axes = figure.add_axes((left + number * (width + gap), bottom, width, height))
        for key, colour in (("experts", experts), ("deltas", deltas)):
            curves = [layer[key] for layer in layers]
            lower = [min(values) for values in zip(*curves, strict=True)]
            upper = [max(values) for values in zip(*curves, strict=True)]
            middle = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axes.fill_between(grid, lower, upper, color=colour, alpha=0.15, linewidth=0)
            axes.plot(grid, middle, color=colour, linewidth=1.6)
        rest = [
            [1 - layer["delta_energy"] * (1 - kept) for kept in layer["deltas"]] for layer in layers
        ]
        whole = [sum(values) / len(values) for values in zip(*rest, strict=True)]
        axes.plot(grid, whole, color=deltas, linewidth=1.4, linestyle=(0, (4, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_title(bank)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g} %")
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        if number:
            axes.set_yticklabels([])
        else:
            axes.set_ylabel("energy kept")
        if number == len(banks) // 2:
            axes.set_xlabel("rank, of the full rank")
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=experts, lw=1.6, label="expert W"),
        Line2D([], [], color=deltas, lw=1.6, label="delta W − base, of its own energy"),
        Line2D([], [], color=deltas, lw=1.4, ls=(0, (4, 2)), label="base + delta, of W's energy"),
    ]
    figure.legend(handles=handles, loc="upper left", ncols=3, bbox_to_anchor=(left - 0.01, 1.0))
    return charts.finish(
        figure,
        "spectra",
        "Singular-value energy of experts and of deltas",
        "Share of the squared singular values that the r largest hold, mean over experts and "
        "layers; bands are the layers' extremes. Deltas are experts less the mean of the layer's "
        "experts weighted by the tokens routed to them. Solid: each of its own energy. Dashed: "
        "what base and delta together keep of the expert, beside the blue line, which pays for no "
        "base. A delta helps where the dashed line is well above the blue one.",
    )


def similarity(comparison: Comparison) -> Drawing | None:
    """Linear CKA between the outputs of a layer's experts, a heat map a layer."""
    found = (comparison.structure or {}).get("similarity")
    if not found or not found["cka"]:
        return None
    import numpy as np

    chosen = _evenly(len(found["cka"]), MAPS)
    columns = min(4, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    side = 1.95
    height = lines * (side + 0.45) + 0.55
    figure = charts.new(height)
    picture = None
    for number, at in enumerate(chosen):
        matrix = np.array(found["cka"][at], dtype=float)  # None becomes NaN
        x = 0.45 + (number % columns) * (side + 0.42)
        y = height - (number // columns + 1) * (side + 0.45) + 0.1
        axes = figure.add_axes((x / charts.WIDTH, y / height, side / charts.WIDTH, side / height))
        picture = charts.cells(axes, matrix, cmap="YlGnBu", vmin=0, vmax=1)
        axes.set_aspect("equal")
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        mean = f", mean {np.nanmean(off):.2f}" if off.size else ""
        axes.set_title(f"layer {found['layers'][at]}{mean}", fontsize=9.5, pad=4)
        _expert_ticks(axes, len(matrix), both=True)
        if len(matrix) <= 8:
            for i, line in enumerate(matrix):
                for j, value in enumerate(line):
                    if i != j and math.isfinite(value):
                        axes.text(
                            j + 0.5, i + 0.52, f"{value:.2f}".removeprefix("0"), ha="center",
                            va="center", fontsize=6.5, color=charts.ink_on(picture.cmap(value)),
                        )  # fmt: skip
    _bar(figure, picture, 0.45, height, "CKA: 0 unrelated, 1 equal up to rotation and scale")
    return charts.finish(
        figure,
        "similarity",
        "Similarity of a layer's experts",
        f"Linear CKA (with the unbiased estimator of HSIC) between the outputs of every two "
        f"experts on the same {found['tokens']} tokens, routed to them or not. High off the "
        "diagonal: experts that a base or a merge can stand for. Low: what merging loses.",
    )


def routing(comparison: Comparison) -> Drawing | None:
    """Share of each text's tokens that every expert of every layer gets."""
    structure = comparison.structure or {}
    found = structure.get("routing")
    if not found or not structure["experts"]:  # a dense model routes nothing
        return None
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    names = list(found)
    layers = structure["layers"]
    experts = max(structure["experts"])
    columns = min(len(names), 5 if experts <= 8 else 3 if experts <= 32 else 2)
    lines = math.ceil(len(names) / columns)
    left, gap, top = 0.5, 0.16, 0.3
    width = (charts.WIDTH - left - 0.1 - gap * (columns - 1)) / columns
    tall = min(max(0.2 * len(layers), 0.7), 3.2)
    height = lines * (tall + top + 0.32) + 0.5
    figure = charts.new(height)
    norm = TwoSlopeNorm(vmin=-2, vcenter=0, vmax=2)
    picture = None
    for number, name in enumerate(names):
        grid = np.full((len(layers), experts), np.nan)
        for y, shares in enumerate(found[name]["shares"]):
            even = 1 / len(shares)
            grid[y, : len(shares)] = np.log2(np.maximum(np.asarray(shares) / even, 2.0**-2))
        x = left + (number % columns) * (width + gap)
        y0 = height - (number // columns + 1) * (tall + top + 0.32) + 0.32
        axes = figure.add_axes((x / charts.WIDTH, y0 / height, width / charts.WIDTH, tall / height))
        axes.set_facecolor("#f3f4f5")
        picture = charts.cells(axes, grid, cmap="PuOr_r", norm=norm)
        axes.set_title(name, fontsize=9.5, pad=4)
        _expert_ticks(axes, experts, both=False)
        every = max(1, math.ceil(len(layers) * 0.18 / tall))
        axes.set_yticks([k + 0.5 for k in range(0, len(layers), every)])
        first = number % columns == 0
        ticks = [str(layers[k]) for k in range(0, len(layers), every)]
        axes.set_yticklabels(ticks if first else [], fontsize=SMALL)
        if first:
            axes.set_ylabel("layer", fontsize=SMALL)
    bar = _bar(
        figure,
        picture,
        left,
        height,
        "tokens of an expert, times an even share (expert →, layer ↓)",
    )
    bar.set_xticks([-2, -1, 0, 1, 2])
    bar.set_xticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    return charts.finish(
        figure,
        "routing",
        "Routing by text",
        "How often each expert of a layer is chosen on each text, against an even share: white is "
        "even, orange more, purple less. Panels that differ show experts that belong to a domain: "
        "what is removed by one text's frequencies may be another text's expert.",
    )


def _bar(figure: Any, picture: Any, left: float, height: float, what: str) -> Any:
    bar = figure.add_axes((left / charts.WIDTH, 0.24 / height, 2.0 / charts.WIDTH, 0.1 / height))
    figure.colorbar(picture, cax=bar, orientation="horizontal")
    bar.minorticks_off()
    bar.tick_params(labelsize=8, length=2, color=GREY)
    bar.grid(False)
    figure.text((left + 2.15) / charts.WIDTH, 0.29 / height, what, fontsize=SMALL, va="center")
    return bar


def _expert_ticks(axes: Any, experts: int, both: bool) -> None:
    every = max(1, experts // 8)
    places = range(0, experts, every)
    axes.set_xticks([k + 0.5 for k in places])
    axes.set_xticklabels([str(k) for k in places], fontsize=7.5)
    if both:
        axes.set_yticks([k + 0.5 for k in places])
        axes.set_yticklabels([str(k) for k in places], fontsize=7.5)


def _evenly(count: int, most: int) -> Sequence[int]:
    """At most so many positions out of `count`, the first and last among them."""
    if count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
