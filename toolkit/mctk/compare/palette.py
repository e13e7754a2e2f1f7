"""Colours and markers of rows in figures: a family shares both, rounding fills the marker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .result import Row

# Dark enough for text on white (contrast 4.5 and more), and told apart by colour-blind readers:
# Okabe and Ito's hues, darkened.
COLOURS = ("#0060a8", "#b34700", "#00705a", "#a0357a", "#6b5200", "#46418c", "#8f1d2c", "#3d5a6c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
GREY, INK, PALE = "#5f6368", "#1c1e21", "#d5d8dc"
ROUNDING = "quantize"


@dataclass(frozen=True)
class Look:
    """How a row is drawn.

    Attributes:
        colour: Of line, marker and label.
        marker: Matplotlib's name.
        filled: Whether the marker is solid; hollow: its terms are rounded as well.
    """

    colour: str
    marker: str
    filled: bool


def family_of(row: Row) -> str:
    """The stages of a row without the rounding that may end it."""
    stages = [stage for stage in row.family.split("+") if stage != ROUNDING]
    return "+".join(stages) or ROUNDING


def is_composed(row: Row) -> bool:
    """Whether something else was rounded."""
    return ROUNDING in row.family.split("+") and family_of(row) != ROUNDING


def looks(rows: Sequence[Row]) -> dict[str, Look]:
    """Family → its look, solid, in order of appearance; rounding alone is grey."""
    families = list(dict.fromkeys(family_of(row) for row in rows))
    found, used = {}, 0
    for family in families:
        if family == ROUNDING:
            found[family] = Look(INK, "*", True)
        else:
            place = used % len(COLOURS)
            found[family] = Look(COLOURS[place], MARKERS[place], True)
            used += 1
    return found


def look_of(row: Row, known: dict[str, Look]) -> Look:
    """A row's own look."""
    look = known[family_of(row)]
    return Look(look.colour, look.marker, not is_composed(row))
