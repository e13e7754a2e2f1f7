"""Reports, model cards and tables: pure functions of what metrics.json holds."""

from .card import render_card
from .parts import label_of
from .report import render_report
from .summary import render_summary, side_by_side
from .tables import Column, Table

__all__ = [
    "Column",
    "Table",
    "label_of",
    "render_card",
    "render_report",
    "render_summary",
    "side_by_side",
]
