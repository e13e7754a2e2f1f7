"""Writes a comparison's tables and its page."""

from __future__ import annotations

from pathlib import Path

from ..files import write_text
from .charts import available
from .figures import write_figures
from .latex import latex
from .markdown import markdown
from .page import html
from .raw import csv
from .result import Comparison


def publish(comparison: Comparison, directory: Path) -> None:
    """Writes comparison.md, .csv, .tex and .html, and the page's figures as figures/NAME.svg.

    Without matplotlib there are no figures, and the page says what to install.
    """
    for form, make in ((".md", markdown), (".csv", csv), (".tex", latex)):
        write_text(directory / f"comparison{form}", make(comparison).rstrip() + "\n")
    drawings = write_figures(comparison, directory / "figures") if available() else None
    write_text(directory / "comparison.html", html(comparison, drawings))
