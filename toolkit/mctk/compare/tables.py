"""A comparison as tables: on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report.tables import NONE, Column, Table, document, fixed, section
from .fields import Field, change_text, fields_of, leaders
from .latex import latex
from .notes import (
    BEST,
    FRONTIER,
    TIED,
    failures,
    lead,
    legend,
    marks,
    methods,
    protocol,
    standing,
)
from .result import Comparison, Interval, Original
from .standing import Entry, Group, frontier, groups_of, score

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["latex", "markdown", "ordered", "terminal"]


@dataclass(frozen=True)
class Cell:
    """One cell as text, and whether it is the best of its column and budget."""

    text: str
    best: bool = False


def ordered(comparison: Comparison, group: Group) -> list[Entry]:
    """A group's entries from the best to those without figures; without a budget by bytes."""
    if group.budget is None:
        key = "bytes"
    else:
        key = "score"

    def place(entry: Entry) -> tuple[bool, float]:
        if key == "bytes":
            value = float(entry.row.sizes.bytes) if entry.row.sizes else None
        else:
            value = entry.mean(lambda row: score(comparison, row))
        return value is None, value or 0.0

    return sorted(group.entries, key=place)


def on_frontier(comparison: Comparison) -> set[str]:
    """Keys of the rows that no other beats in bytes and score."""
    points, keys = [], []
    for group in groups_of(comparison):
        for entry in group.entries:
            value = entry.mean(lambda row: score(comparison, row))
            if value is not None and entry.row.sizes is not None:
                points.append((float(entry.row.sizes.bytes), value))
                keys.append(entry.row.key)
    return {keys[i] for i in frontier(points)}


def name_of(group: Group, entry: Entry, edge: set[str]) -> str:
    """An entry's label with the marks around it."""
    before = standing(group, entry)
    after = (FRONTIER if entry.row.key in edge else "") + marks(entry.row)
    return " ".join(filter(None, (before, entry.label))) + (f" {after}" if after else "")


def cells_of(
    comparison: Comparison, fields: Sequence[Field], entry: Entry, best: set[tuple[str, str]]
) -> list[Cell]:
    """An entry's figures."""
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


# --- terminal ------------------------------------------------------------------------------------


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


# --- Markdown ------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """GitHub Markdown: two tables a budget, quality and cost, then how it was measured."""
    groups, edge = groups_of(comparison), on_frontier(comparison)
    fields = fields_of(comparison)
    return document(
        f"# {comparison.name}: {comparison.model.name}",
        *(
            section(
                group.title,
                _lead(comparison, group),
                *(
                    _group_table(comparison, group, [f for f in fields if f.part == part], edge)
                    for part in ("quality", "cost")
                ),
            )
            for group in groups
        ),
        section("Marks", _bullets(legend(comparison, groups))),
        section("Rows without figures", _bullets(failures(groups))),
        section("Change of log-perplexity on each text", _changes(comparison, groups)),
        section("Columns", _bullets(f"{f.title}: {f.help}" for f in _once(fields))),
        section("Methods", _methods(comparison)),
        section("How it was measured", _bullets(protocol(comparison)), _command(comparison)),
    )


def _lead(comparison: Comparison, group: Group) -> str:
    found = lead(comparison, group)
    return f"By mean log-perplexity {found}." if found else ""


def _group_table(
    comparison: Comparison, group: Group, fields: Sequence[Field], edge: set[str]
) -> str:
    best = leaders(fields, group.ranked)
    columns = [Column("name", "", left=True), *(Column(f.key, f.heading) for f in fields)]
    lines = [("original", original_cells(fields, comparison.original))]
    guess = chance_cells(fields)
    lines += [("guessing", guess)] if guess else []
    for entry in ordered(comparison, group):
        lines.append((name_of(group, entry, edge), cells_of(comparison, fields, entry, best)))
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            **{
                field.key: f"**{cell.text}**" if cell.best else cell.text
                for field, cell in zip(fields, cells, strict=True)
            },
        }
        for name, cells in lines
    ]
    return Table(columns, list(rows)).markdown() if fields else ""


def _changes(comparison: Comparison, groups: Sequence[Group]) -> str:
    """Every text's change with its interval, folded away."""
    columns = [
        Column("budget", "removed"),
        Column("name", "", left=True),
        *(Column(name, name) for name in comparison.texts),
    ]
    signed = fixed(4, sign=True)

    def shown(found: Interval | None) -> str:
        if found is None:
            return NONE
        if found.low is None or found.high is None:
            return signed(found.value)
        return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"

    several = len(comparison.calibrations) > 1
    rows: list[dict[str, Any]] = []
    for group in groups:
        for entry in ordered(comparison, group):
            for row in entry.done:
                changes = {name: shown(text.change) for name, text in row.texts.items()}
                rows.append(
                    {
                        "budget": f"{100 * group.budget.remove:g} %" if group.budget else NONE,
                        "name": row.label + (f", seed {row.seed}" if several else ""),
                        **changes,
                    }
                )
    if not rows or not comparison.texts:
        return ""
    body = Table(columns, list(rows)).markdown()
    return f"<details><summary>{len(rows)} rows</summary>\n\n{body}\n\n</details>"


def _once(fields: Sequence[Field]) -> list[Field]:
    """One field for each kind: not every text's perplexity."""
    found: dict[str, Field] = {}
    for field in fields:
        found.setdefault(field.key.split(":")[0], field)
    return list(found.values())


def _methods(comparison: Comparison) -> str:
    columns = [Column("name", "row", left=True), Column("chain", "steps", left=True)]
    return Table(columns, [{"name": n, "chain": c} for n, c in methods(comparison)]).markdown()


def _command(comparison: Comparison) -> str:
    return f"```bash\n{comparison.command}\n```" if comparison.command else ""


def _bullets(lines: Any) -> str:
    return "\n".join(f"- {line}" for line in lines)
