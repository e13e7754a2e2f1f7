"""A comparison as one HTML page that needs nothing else: tables, figures, what became of each row.

Everything that comes from files is escaped; the page forbids itself every request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..report.tables import NONE
from .charts import Drawing, available
from .fields import Field, fields_of, leaders
from .notes import BEST, FRONTIER, TIED, failures, legend, marks, methods, protocol, winner
from .page_assets import CSS, SCRIPT
from .page_rows import details_of
from .palette import Looks, is_composed, looks
from .result import Comparison
from .standing import Entry, Group, groups_of, on_frontier, ordered
from .tables import Cell, cells_of, chance_cells, original_cells

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def html(comparison: Comparison, drawings: Sequence[Drawing] | None = None) -> str:
    """Writes the page.

    Args:
        comparison: What to show.
        drawings: Its figures; by default they are drawn, and without matplotlib a line stands in
            their place.
    """
    groups = groups_of(comparison)
    fields = fields_of(comparison)
    title = f"{comparison.name}: {comparison.model.name}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            _header(comparison, title),
            "<main>",
            _findings(comparison, groups),
            _board(comparison, groups, fields),
            _figures(comparison, drawings),
            _rows(comparison, groups),
            _measured(comparison, groups, fields),
            "</main>",
            f'<footer class="soft">{_made(comparison)}</footer>',
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _header(comparison: Comparison, title: str) -> str:
    model = comparison.model
    shape = f"{model.layers} layers"
    if model.experts:
        shape += f", {model.experts} experts of which a token passes {model.experts_per_token}"
    facts = [("Model", f"{model.name} ({model.model_type}): {shape}")]
    for one in comparison.calibrations:
        several = f", seed {one.seed}" if len(comparison.calibrations) > 1 else ""
        sources = f" of {', '.join(one.sources)}" if one.sources else ""
        words = f"{one.sequences} sequences of {one.length} tokens{sources}{several}"
        facts.append(("Calibration", words))
    done = sum(row.status == "ok" for row in comparison.rows)
    rows = f"{done} of {len(comparison.rows)} have figures" + (
        "" if comparison.finished else "; not finished: the same command goes on"
    )
    facts.append(("Rows", rows))
    if comparison.protocols:
        facts.append(("Measured", "; ".join(comparison.protocols)))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    links = "".join(
        f'<li><a href="#{anchor}">{words}</a></li>'
        for anchor, words in (
            ("table", "Table"),
            ("figures", "Figures"),
            ("rows", "Every row"),
            ("measured", "How it was measured"),
        )
    )
    return (
        f"<header><h1>{escape(title)}</h1>"
        f'<dl class="facts">{listed}</dl>{command}'
        f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav></header>'
    )


def _findings(comparison: Comparison, groups: Sequence[Group]) -> str:
    """The best of every budget in a sentence."""
    lines = [
        f"<li>{escape(group.title)}: {escape(said)}.</li>"
        for group in groups
        if (said := winner(comparison, group))
    ]
    if not lines:
        return ""
    return (
        '<section aria-label="Findings"><ul>' + "".join(lines) + "</ul>"
        '<p class="soft">Differences are of log-perplexity, the mean over texts, with the 95 % '
        "interval of a paired bootstrap on the same windows.</p></section>"
    )


# --- the table -----------------------------------------------------------------------------------


def _board(comparison: Comparison, groups: Sequence[Group], fields: Sequence[Field]) -> str:
    heads = ['<th scope="col"><button type="button">method</button></th>']
    for field in fields:
        better = f' data-better="{field.better}"' if field.better else ""
        chance = f"; guessing gives {field.chance:.3f}" if field.chance is not None else ""
        heads.append(
            f'<th scope="col" class="{field.part}"{better}><button type="button" '
            f'title="{escape(field.help + chance)}">{escape(field.heading)}</button></th>'
        )
    bodies = [_top(comparison, fields)]
    edge, known = on_frontier(comparison), looks(comparison.rows)
    for number, group in enumerate(groups):
        best = leaders(fields, group.ranked)
        lines = [
            f'<tr class="group"><th scope="rowgroup" colspan="{len(fields) + 1}">'
            f"<span>{escape(group.title)}</span></th></tr>"
        ]
        for place, entry in enumerate(ordered(comparison, group)):
            name = _name(group, entry, edge, f"row-{number}-{place}", known)
            cells = cells_of(comparison, fields, entry, best)
            lines.append(_line(group, entry, name, place, fields, cells))
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    said = "".join(f"<li>{escape(line)}</li>" for line in legend(comparison, groups))
    return (
        '<section id="table"><h2>Table</h2>'
        "<p>Click a heading to sort within each budget; a name leads to its steps, ranks and "
        "errors. Bold and green: the best figure of its budget.</p>"
        '<div class="choice" role="group" aria-label="Columns">'
        '<button type="button" data-show="quality-only">Quality</button>'
        '<button type="button" data-show="cost-only">Size, speed, cost</button>'
        '<button type="button" data-show="all">All columns</button></div>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison table">'
        '<table class="board" id="board"><thead><tr>'
        + "".join(heads)
        + "</tr></thead>"
        + "\n".join(bodies)
        + f"</table></div><ul>{said}</ul></section>"
    )


def _top(comparison: Comparison, fields: Sequence[Field]) -> str:
    """The original, and what guessing gives."""
    lines = [("original", original_cells(fields, comparison.original))]
    guess = chance_cells(fields)
    lines += [("guessing", guess)] if guess else []
    rows = [
        f'<tr class="original"><th scope="row"><span class="mark"></span>{name}</th>'
        + "".join(
            f'<td class="{field.part}">{escape(cell.text)}</td>'
            for field, cell in zip(fields, cells, strict=True)
        )
        + "</tr>"
        for name, cells in lines
    ]
    return "<tbody>" + "".join(rows) + "</tbody>"


def _name(group: Group, entry: Entry, edge: set[str], anchor: str, known: Looks) -> str:
    row = entry.row
    look = known.of(row)
    fill = "#fff" if is_composed(row) else look.colour
    before, words = "", ""
    if entry is group.best:
        before, words = BEST, "best of its budget"
    elif entry in group.tied:
        before, words = TIED, f"not told from {group.best.label if group.best else 'the best'}"
    mark = f'<span class="mark" title="{escape(words)}">{before}</span>'
    dot = f'<span class="dot" style="border-color:{look.colour};background:{fill}"></span>'
    after = (FRONTIER if row.key in edge else "") + marks(row)
    flags = "; ".join(flag.text for flag in row.flags)
    small = f' <small title="{escape(flags)}">{escape(after)}</small>' if after else ""
    return f'{mark}{dot}<a href="#{anchor}">{escape(entry.label)}</a>{small}'


def _line(
    group: Group,
    entry: Entry,
    name: str,
    place: int,
    fields: Sequence[Field],
    cells: Sequence[Cell],
) -> str:
    kind = "best" if entry is group.best else "" if entry.done else "failed"
    opening = (
        f'<tr class="{kind}" data-place="{place}" data-name="{escape(entry.label)}">'
        f'<th scope="row">{name}</th>'
    )
    if not entry.done:
        reason = escape(entry.row.reason or "no reason was given")
        said = f"<details><summary>{escape(entry.row.status)}</summary>{reason}</details>"
        return f'{opening}<td colspan="{len(fields)}">{said}</td></tr>'
    found = []
    for field, cell in zip(fields, cells, strict=True):
        value = entry.mean(field.value)
        raw = f' data-value="{value!r}"' if value is not None else ""
        kind = f"{field.part} best" if cell.best else field.part
        figure, bracket, interval = cell.text.partition(" [")
        text = escape(figure) + (f" <small>[{escape(interval)}</small>" if bracket else "")
        found.append(f'<td class="{kind}"{raw}>{text}</td>')
    return opening + "".join(found) + "</tr>"


# --- the rest ------------------------------------------------------------------------------------


def _figures(comparison: Comparison, drawings: Sequence[Drawing] | None) -> str:
    if drawings is None and available():
        from .figures import figures

        drawings = figures(comparison)
    if drawings is None:
        body = (
            "<p>There are no figures: they need matplotlib. "
            "<code>pip install 'mctk[figures]'</code>, then the same command again: what is "
            "measured is kept.</p>"
        )
    else:
        body = "\n".join(
            f'<figure id="figure-{drawing.name}"><h3>{escape(drawing.title)}</h3>'
            f'<div class="picture" tabindex="0" role="region" '
            f'aria-label="{escape(drawing.title)}">{drawing.svg}</div>'
            f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
            for drawing in drawings
        )
    return f'<section id="figures"><h2>Figures</h2>{body}</section>'


def _rows(comparison: Comparison, groups: Sequence[Group]) -> str:
    parts = []
    for number, group in enumerate(groups):
        parts.append(f"<h3>{escape(group.title)}</h3>")
        for place, entry in enumerate(ordered(comparison, group)):
            parts.append(details_of(comparison, entry, f"row-{number}-{place}"))
    return '<section id="rows"><h2>Every row</h2>' + "\n".join(parts) + "</section>"


def _measured(comparison: Comparison, groups: Sequence[Group], fields: Sequence[Field]) -> str:
    lost = _list(failures(groups))
    kinds: dict[str, Field] = {}
    for field in fields:
        kinds.setdefault(field.key.split(":")[0], field)
    columns = "".join(
        f"<dt>{escape(field.title)}</dt><dd>{escape(field.help)}</dd>" for field in kinds.values()
    )
    chains = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="words">{escape(chain)}</td></tr>'
        for name, chain in methods(comparison)
    )
    source = (
        "<details><summary>The comparison's file</summary>"
        f"<pre>{escape(comparison.source)}</pre></details>"
        if comparison.source
        else ""
    )
    return (
        '<section id="measured"><h2>How it was measured</h2>'
        + (f"<h3>Rows without figures</h3>{lost}" if lost else "")
        + f"<h3>Protocol</h3>{_list(protocol(comparison))}"
        + f'<h3>Columns</h3><dl class="facts">{columns}</dl>'
        + '<h3>Methods and their versions</h3><div class="wide"><table class="plain">'
        + '<thead><tr><th scope="col">row</th><th scope="col">steps</th></tr></thead>'
        + f"<tbody>{chains}</tbody></table></div>"
        + source
        + "</section>"
    )


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _made(comparison: Comparison) -> str:
    version = comparison.versions.get("mctk") or NONE
    when = f", {comparison.made}" if comparison.made else ""
    return f"Made by mctk {escape(version + when)}. This page makes no request to anyone."
