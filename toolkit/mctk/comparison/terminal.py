"""A comparison on a terminal: one part a budget, with as many columns as the width holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .fields import Field, fields_of, leaders
from .notes import BEST, TIED, failures, legend, protocol, winner
from .result import Comparison
from .standing import Group, groups_of, on_frontier, ordered
from .tables import Cell, cells_of, chance_cells, name_of, original_cells

if TYPE_CHECKING:
    from rich.console import Console


def terminal(comparison: Comparison, console: Console | None = None) -> None:
    """Prints the comparison, one part a budget, with as many columns as the width holds.

    Args:
        comparison: What to print.
        console: Where; standard output by default, 100 columns where that is no terminal.
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=100)
    groups, edge = groups_of(comparison), on_frontier(comparison)
    fields = fields_of(comparison)
    original, guess = original_cells(fields, comparison.original), chance_cells(fields)
    parts: list[tuple[Group, list[tuple[str, list[Cell]]]]] = []
    for group in groups:
        best = leaders(fields, group.ranked)
        lines = []
        for entry in ordered(comparison, group):
            name = name_of(group, entry, edge)
            name = name if name[0] in BEST + TIED else f"  {name}"
            lines.append((name, cells_of(comparison, fields, entry, best)))
        parts.append((group, lines))
    every = [("  original", original), *(line for _, lines in parts for line in lines)]
    width = max(len(name) for name, _ in every)
    columns = _fitting(fields, [cells for _, cells in every], console.width - width)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style))

    def row(name: str, cells: Sequence[Cell], style: str = "") -> None:
        line = Text(name.ljust(width), style=style, no_wrap=True)
        for i, space in columns:
            line.append(cells[i].text.rjust(space), "bold green" if cells[i].best else style)
        console.print(line)

    say(f"{comparison.name}: {comparison.model.name}", "bold")
    for part in (0, 1):  # a heading takes two lines: "ppl" above the text's name
        heads = [fields[i].title for i, _ in columns]
        line = "".join(_halves(h)[part].rjust(n) for h, (_, n) in zip(heads, columns, strict=True))
        say(" " * width + line, "bold")
    row("  original", original)
    if any(guess[i].text for i, _ in columns if guess):
        row("  guessing", guess)
    for group, lines in parts:
        say("")
        say(group.title, "italic")
        if said := winner(comparison, group):
            say(f"  {said}", "dim")
        for name, cells in lines:
            failed = bool(cells) and cells[0].text in ("failed", "refused", "pending")
            row(name, cells, "dim" if failed else "bold" if name.startswith(BEST) else "")
    say("")
    shown = {i for i, _ in columns}
    hidden = [field.title for i, field in enumerate(fields) if i not in shown]
    if hidden:
        say(f"Left to the other formats: {', '.join(hidden)}.", "dim")
    for text in (*legend(comparison, groups), *failures(groups)):
        say(text)
    for text in protocol(comparison):
        say(f"{text}.", "dim")


def _halves(heading: str) -> tuple[str, str]:
    """A heading on two lines."""
    first, _, second = heading.partition(" ")
    return (first, second) if second else ("", first)


def _fitting(
    fields: Sequence[Field], lines: Sequence[Sequence[Cell]], left: int
) -> list[tuple[int, int]]:
    """Positions and widths of the columns that fit, the most wanted first, in the table's order.

    Columns of one rank (the texts' perplexities) are shown together or not at all.
    """
    shown: list[tuple[int, int]] = []
    for rank in sorted({field.rank for field in fields if field.rank < 20}):
        need = [
            (i, 2 + max(*map(len, _halves(field.title)), *(len(c[i].text) for c in lines)))
            for i, field in enumerate(fields)
            if field.rank == rank
        ]
        if sum(width for _, width in need) <= left:
            shown += need
            left -= sum(width for _, width in need)
    return sorted(shown)
