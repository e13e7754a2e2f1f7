"""What all figures share: style, SVG that can stand in a page, labels that do not overlap."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any

from ..errors import UserError
from .palette import GREY, INK, PALE

WIDTH = 10.0  # inches of every figure: 720 points, about 13 pixels a letter on a page of 960
Box = tuple[float, float, float, float]  # left, low, right, high
# Where a label may stand from its point, in points; the nearer ones first.
OFFSETS = [
    (dx * step, dy * step)
    for step in (1.0, 1.8, 2.8, 4.0, 5.5, 7.0)
    for dx, dy in ((8, 5), (8, -5), (-8, 5), (-8, -5), (0, 10), (0, -10), (12, 0), (-12, 0))
]
CELLS = 300  # of a heat map up to which each is drawn by itself
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Arial, sans-serif"  # none wider than the first
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",  # text stays text: it is found, read aloud and small
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@dataclass(frozen=True)
class Drawing:
    """A figure that is done.

    Attributes:
        name: Of its file, and what its ids begin with.
        title: A line.
        caption: How to read it.
        svg: The picture, well-formed XML without a prolog.
    """

    name: str
    title: str
    caption: str
    svg: str


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_available() -> None:
    """Refuses to draw without matplotlib.

    Raises:
        UserError: It is not installed.
    """
    if not available():
        raise UserError("figures need matplotlib: pip install 'mctk[figures]'")


@contextmanager
def styled() -> Iterator[None]:
    """While open, matplotlib draws in this style, whatever the user's own is."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def new(height: float, width: float = WIDTH) -> Any:
    """An empty figure without a window, [inches]."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    return figure


def finish(figure: Any, name: str, title: str, caption: str) -> Drawing:
    """Writes a figure as SVG that can stand in a file or, beside others, in a page.

    Args:
        figure: Matplotlib's.
        name: Of the file; every id begins with it.
        title: Becomes the picture's name for those who hear it.
        caption: Becomes its description.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return Drawing(name, title, caption, _embeddable(buffer.getvalue(), name, title, caption))


def _embeddable(svg: str, name: str, title: str, caption: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|\bhref=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"font: ([^;\"]*?) ?'DejaVu Sans'[^;\"]*", rf"font: \1 {FONTS}", svg)
    head, _, rest = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group()} role="img" aria-labelledby="{name}-title {name}-desc" '
        'stroke-linejoin="round" stroke-linecap="butt">'
    )
    words = (
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(caption)}</desc>'
    )
    body = re.sub(r"\n\s*\n", "\n", rest)
    return f"{opening}\n{words}{body}".strip() + "\n"


def cells(axes: Any, grid: Any, **style: Any) -> Any:
    """A heat map: cells with edges, or, where there are many, an image of a pixel each.

    Args:
        axes: Matplotlib's; the first line of the grid is drawn on top.
        grid: Values [lines, columns]; NaN stays empty.
        style: Colour map and norm.
    """
    lines, columns = grid.shape
    if lines * columns <= CELLS:
        picture = axes.pcolormesh(grid, edgecolors="white", linewidth=0.8, **style)
        axes.invert_yaxis()
    else:
        extent = (0, columns, lines, 0)
        picture = axes.imshow(grid, interpolation="none", aspect="auto", extent=extent, **style)
    axes.grid(False)
    axes.tick_params(length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return picture


def ink_on(colour: Sequence[float]) -> str:
    """Dark or white, whichever reads better on a colour (red, green, blue in 0 to 1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.18 else "white"


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least `gap` apart, between two ends, in the same order.

    What crowds is moved as a block about its mean, so that nothing moves further than it must;
    where the room does not suffice the gap shrinks.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []  # [start, members, sum of (wanted - offset within the block)]
    for i in order:
        blocks.append([0.0, 1, wanted[i]])
        while True:
            block = blocks[-1]
            block[0] = min(max(block[2] / block[1], low), high - gap * (block[1] - 1))
            if len(blocks) < 2 or blocks[-2][0] + gap * blocks[-2][1] <= block[0]:
                break
            blocks.pop()
            before = blocks[-1]
            before[2] += block[2] - gap * before[1] * block[1]
            before[1] += block[1]
    places = [start + gap * k for start, members, _ in blocks for k in range(int(members))]
    found = [0.0] * len(wanted)
    for place, i in zip(places, order, strict=True):
        found[i] = place
    return found


def log_ticks(low: float, high: float, fewest: int = 4) -> list[float]:
    """Round values on a logarithmic axis: 1 and 3 of each power of ten, more where those are few.

    Args:
        low: The axis' lower end, above 0.
        high: Its upper end.
        fewest: So many ticks, if the finest choice has them.
    """
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 3, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [step * 10.0**power for power in powers for step in steps]
        found = [tick for tick in every if low <= tick <= high]
        if len(found) >= fewest:
            break
    return found


def place_labels(
    axes: Any, points: Sequence[tuple[float, float]], texts: Sequence[Any], taken: Sequence[Any]
) -> None:
    """Moves texts beside their points to where they cover neither points nor each other.

    Args:
        axes: Matplotlib's, with its limits set.
        points: Positions in data.
        texts: Annotations of the points, in `offset points`.
        taken: Further points in data that must not be covered.
    """
    renderer = _renderer(axes.figure)
    unit = axes.figure.dpi / 72
    dots = [tuple(dot) for dot in axes.transData.transform([*points, *taken])]
    frame = axes.get_window_extent(renderer).extents
    placed: list[Box] = []
    for text, dot in zip(texts, dots, strict=False):
        extent = text.get_window_extent(renderer)
        width, height = extent.width * 1.03, extent.height
        best: tuple[float, float, float, Box] | None = None
        for dx, dy in OFFSETS:
            x, y = dot[0] + dx * unit, dot[1] + dy * unit
            left = x if dx > 0 else x - width if dx < 0 else x - width / 2
            low = y if dy > 0 else y - height if dy < 0 else y - height / 2
            box = (left, low, left + width, low + height)
            hits = 3 * sum(_overlap(box, other) for other in placed)
            hits += sum(box[0] <= a <= box[2] and box[1] <= b <= box[3] for a, b in dots)
            outside = box[0] < frame[0] or box[2] > frame[2] or box[1] < frame[1]
            hits += 5 * (outside or box[3] > frame[3])
            cost = 1000 * hits + math.hypot(dx, dy)
            if best is None or cost < best[0]:
                best = cost, dx, dy, box
        assert best is not None
        _, dx, dy, box = best
        text.set_position((dx, dy))
        text.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")
        text.set_verticalalignment("bottom" if dy > 0 else "top" if dy < 0 else "center")
        placed.append(box)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def legend_above(figure: Any, handles: Sequence[Any], left: float) -> None:
    """A legend along the upper edge, on as few lines as the width allows.

    Args:
        figure: Matplotlib's.
        handles: What it explains.
        left: Where it begins, as a share of the width.
    """
    renderer = _renderer(figure)
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="upper left",
            ncols=columns,
            bbox_to_anchor=(left, 1.0),
            columnspacing=1.4,
            handlelength=1.8,
        )
        if legend.get_window_extent(renderer).x1 <= figure.bbox.x1 or columns == 1:
            return
        legend.remove()


def text_width(figure: Any, words: Sequence[str], size: float) -> float:
    """Inches that the longest of some words takes."""
    from matplotlib.text import Text

    renderer = _renderer(figure)
    found = 0.0
    for word in words:
        text = Text(0, 0, word, fontsize=size, figure=figure)
        found = max(found, text.get_window_extent(renderer).width / figure.dpi)
    return found


def _renderer(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(
        figure.get_figwidth() * figure.dpi, figure.get_figheight() * figure.dpi, figure.dpi
    )
