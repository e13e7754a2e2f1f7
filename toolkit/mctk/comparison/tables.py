"""What a comparison's tables on a terminal, in Markdown and on the page have in common: cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report.tables import NONE
from .fields import Field, change_text
from .notes import FRONTIER, marks, standing
from .result import Comparison, Original
from .standing import Entry, Group


@dataclass(frozen=True)
class Cell:
    """One cell as text, and whether it is the best of its column and budget."""

    text: str
    best: bool = False


def name_of(group: Group, entry: Entry, edge: set[str], label: str | None = None) -> str:
    """An entry's label with the marks around it.

    Args:
        group: Its group.
        entry: The entry.
        edge: Keys of the rows on the frontier.
        label: The label as the output writes it; by default as it is.
    """
    before = standing(group, entry)
    after = (FRONTIER if entry.row.key in edge else "") + marks(entry.row)
    label = entry.label if label is None else label
    return " ".join(filter(None, (before, label))) + (f" {after}" if after else "")


def cells_of(
    comparison: Comparison, fields: Sequence[Field], entry: Entry, best: set[tuple[str, str]]
) -> list[Cell]:
    """An entry's figures; of one without any, its status in the first cell."""
    if not entry.done:
        return [Cell(entry.row.status if i == 0 else NONE) for i in range(len(fields))]
    found = []
    for field in fields:
        text = change_text(comparison, entry) if field.key == "change" else field.shown(entry)
        found.append(Cell(text, (entry.row.key, field.key) in best))
    return found


def original_cells(fields: Sequence[Field], original: Original) -> list[Cell]:
    """The original's figures."""
    return [Cell(field.of_original(original)) for field in fields]


def chance_cells(fields: Sequence[Field]) -> list[Cell]:
    """What guessing gives; empty where no column has such a figure."""
    if all(field.chance is None for field in fields):
        return []
    return [
        Cell(field.format(field.chance) if field.chance is not None else "") for field in fields
    ]
