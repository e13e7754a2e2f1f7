"""Numbers as people read them, and one table that is Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Format = Callable[[Any], str]
NONE = "—"  # what a missing value looks like


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers of layers or experts in short.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def count(value: Any) -> str:
    """A large number in three figures: 46.7 B, 11.3 M, 812.

    >>> count(46_702_792_704)
    '46.7 B'
    """
    if not _numeric(value):
        return NONE
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f}"


def size(value: Any) -> str:
    """Bytes in decimal units, as disks and the Hub count them: 93.4 GB."""
    if not _numeric(value):
        return NONE
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= 0.9995 * factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def _three(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def whole(value: Any) -> str:
    """Every digit, in groups of three: 46,702,792,704."""
    return f"{value:,.0f}" if _numeric(value) else NONE


def fixed(decimals: int, sign: bool = False) -> Format:
    """A format with a fixed number of decimals, with a plus sign if asked; no minus before 0."""
    spec = f"{'+' if sign else ''}z.{decimals}f"
    return lambda value: format(value, spec) if _numeric(value) else NONE


def percent(value: Any) -> str:
    """A fraction as a percentage with one decimal: 40.0 %."""
    return f"{100 * value:.1f} %" if _numeric(value) else NONE


def scientific(value: Any) -> str:
    """Four decimals, or powers of ten where those would show nothing: 0.0123, 3.2e-06."""
    if not _numeric(value):
        return NONE
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def duration(value: Any) -> str:
    """Seconds as 8.2 s, 3 min 20 s, 2 h 05 min."""
    if not _numeric(value):
        return NONE
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def text(value: Any) -> str:
    """Anything as it is; nothing as a dash."""
    return NONE if value is None or value == "" else str(value)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Where a row has its value, and the name in CSV and JSON.
        title: Heading in Markdown.
        format: Makes the text in Markdown.
        left: Aligns the column left (words) rather than right (numbers).
    """

    key: str
    title: str
    format: Format = text
    left: bool = False


@dataclass
class Table:
    """Rows of raw values; a string among numbers is shown as it is.

    Attributes:
        columns: In order.
        rows: Values by column key; absent ones are shown as a dash.
        notes: Sentences below the Markdown table.
    """

    columns: Sequence[Column]
    rows: list[Mapping[str, Any]]
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Formatted text of every row."""
        return [
            [_cell(column, row.get(column.key)) for column in self.columns] for row in self.rows
        ]

    def markdown(self) -> str:
        """GitHub Markdown, padded so that it also reads well in a terminal."""
        header = [column.title for column in self.columns]
        grid = [[_escape(cell) for cell in row] for row in [header, *self.cells()]]
        widths = [max(3, *(len(row[i]) for row in grid)) for i in range(len(header))]
        rule = [
            "-" * width if column.left else "-" * (width - 1) + ":"
            for column, width in zip(self.columns, widths, strict=True)
        ]
        lines = []
        for row in [grid[0], rule, *grid[1:]]:
            padded = [
                cell.ljust(width) if column.left else cell.rjust(width)
                for column, cell, width in zip(self.columns, row, widths, strict=True)
            ]
            lines.append("| " + " | ".join(padded) + " |")
        if self.notes:
            lines += ["", *(f"{note}  " for note in self.notes)]
        return "\n".join(lines)

    def csv(self) -> str:
        """Comma-separated raw values; a missing one is empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        for row in self.rows:
            values = [row.get(column.key) for column in self.columns]
            writer.writerow(["" if value is None else value for value in values])
        return buffer.getvalue().rstrip("\n")

    def json(self) -> str:
        """A JSON list of rows with all that they carry, also what no column shows."""
        return json.dumps([dict(row) for row in self.rows], indent=2, ensure_ascii=False)


def _cell(column: Column, value: Any) -> str:
    return text(value) if isinstance(value, str) else column.format(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def section(title: str, *parts: str, level: int = 2) -> str:
    """A Markdown section, or nothing where all its parts are empty."""
    body = [part for part in parts if part]
    return "\n\n".join(["#" * level + " " + title, *body]) if body else ""


def document(*parts: str) -> str:
    """Joins the parts of a Markdown document that are not empty."""
    return "\n\n".join(part for part in parts if part) + "\n"


def get(value: Any, *keys: str) -> Any:
    """Follows keys into nested mappings; None where one is absent or null.

    >>> get({"a": {"b": 1}}, "a", "b"), get({"a": None}, "a", "b")
    (1, None)
    """
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
