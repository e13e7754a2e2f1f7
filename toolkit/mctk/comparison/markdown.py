"""A comparison as GitHub Markdown. What files and users named is escaped: it is text, no markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..report.tables import NONE, Column, Table, document, fixed, section
from .fields import Field, fields_of, leaders
from .notes import failures, legend, methods, protocol, winner
from .result import Comparison, TextScore
from .scores import DOUBT, FEW
from .standing import Group, groups_of, on_frontier, ordered
from .tables import cells_of, chance_cells, name_of, original_cells

# What would begin markup: emphasis, code, links, tags, entities. `_` within a word begins none.
_MARKUP = re.compile(r"[\\`*\[\]<]|(?<![^\W_])_|_(?![^\W_])|~(?=~)|&(?=#|\w+;)")


def literal(text: str) -> str:
    """Text that reads in Markdown as it is, on one line."""
    return _MARKUP.sub(lambda found: "\\" + found.group(), " ".join(text.split()))


def markdown(comparison: Comparison) -> str:
    """GitHub Markdown: two tables a budget, quality and cost, then how it was measured."""
    groups, edge = groups_of(comparison), on_frontier(comparison)
    fields = fields_of(comparison)
    return document(
        f"# {literal(f'{comparison.name}: {comparison.model.name}')}",
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
        section("Marks", _bullets(map(literal, legend(comparison, groups)))),
        section("Rows without figures", _bullets(map(literal, failures(groups)))),
        section("Change of log-perplexity on each text", _changes(comparison, groups)),
        section("Columns", _bullets(literal(f"{f.title}: {f.help}") for f in _once(fields))),
        section("Methods", _methods(comparison)),
        section(
            "How it was measured",
            _bullets(map(literal, protocol(comparison))),
            _command(comparison),
        ),
    )


def _lead(comparison: Comparison, group: Group) -> str:
    found = winner(comparison, group, literal)
    return f"By mean log-perplexity {found}." if found else ""


def _group_table(
    comparison: Comparison, group: Group, fields: Sequence[Field], edge: set[str]
) -> str:
    best = leaders(fields, group.ranked)
    columns = [Column("name", "", left=True), *(Column(f.key, literal(f.heading)) for f in fields)]
    lines = [("original", original_cells(fields, comparison.original))]
    guess = chance_cells(fields)
    lines += [("guessing", guess)] if guess else []
    for entry in ordered(comparison, group):
        name = name_of(group, entry, edge, literal(entry.label))
        lines.append((name, cells_of(comparison, fields, entry, best)))
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
        *(Column(name, literal(name)) for name in comparison.texts),
    ]
    signed = fixed(4, sign=True)

    def shown(text: TextScore) -> str:
        found = text.change
        if found is None:
            return NONE
        if found.low is None or found.high is None:
            return signed(found.value)
        mark = DOUBT if text.windows < FEW else ""
        return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]{mark}"

    several = len(comparison.calibrations) > 1
    rows: list[dict[str, Any]] = []
    for group in groups:
        for entry in ordered(comparison, group):
            for row in entry.done:
                changes = {name: shown(text) for name, text in row.texts.items()}
                rows.append(
                    {
                        "budget": f"{100 * group.budget.remove:g} %" if group.budget else NONE,
                        "name": literal(row.label) + (f", seed {row.seed}" if several else ""),
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
    listed = [{"name": literal(n), "chain": literal(c)} for n, c in methods(comparison)]
    return Table(columns, list(listed)).markdown()


def _command(comparison: Comparison) -> str:
    return f"```bash\n{comparison.command}\n```" if comparison.command else ""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
