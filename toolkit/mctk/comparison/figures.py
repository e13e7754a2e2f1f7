"""All figures of a comparison, for the page and as files."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from .charts import Drawing, available, check_available, styled
from .figures_layers import layer_errors, pass_errors, ranks
from .figures_model import routing, similarity, spectra
from .figures_quality import by_bytes, by_parameters
from .result import Comparison

__all__ = ["Drawing", "available", "figures", "write_figures"]

DRAWERS = (
    by_parameters,
    by_bytes,
    layer_errors,
    pass_errors,
    ranks,
    spectra,
    similarity,
    routing,
)


def figures(comparison: Comparison) -> list[Drawing]:
    """Draws what the comparison has data for.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_available()
    with styled():
        drawn = [draw(comparison) for draw in DRAWERS]
    return [drawing for drawing in drawn if drawing is not None]


def write_figures(comparison: Comparison, directory: Path) -> list[Drawing]:
    """Draws every figure and writes it as NAME.svg.

    Raises:
        UserError: matplotlib is not installed.
    """
    drawings = figures(comparison)
    directory.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        write_text(directory / f"{drawing.name}.svg", drawing.svg)
    return drawings
