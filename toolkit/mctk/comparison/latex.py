"""A comparison as a LaTeX table for a paper (booktabs)."""

from __future__ import annotations

from collections.abc import Sequence

from .fields import Field, fields_of, leaders
from .notes import BEST, FLAGS, doubt, marks
from .result import Comparison
from .standing import Entry, Group, groups_of, ordered

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "²": r"\textsuperscript{2}",
    "³": r"\textsuperscript{3}",
    "→": r"$\rightarrow$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "×": r"$\times$",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "§": r"\S{}",
    "¶": r"\P{}",
    "♯": r"$\sharp$",
    "⊙": r"$\odot$",
    "∘": r"$\circ$",
    "\u00a0": "~",
    "≈": r"$\approx$",
    "★": r"$\star$",
    "◆": r"$\diamond$",
}
PAGE = 40  # rows that one page holds
# What a paper has room for.
COLUMNS = (
    "kept",
    "bytes_share",
    "active_parameters",
    "perplexity",
    "change",
    "kl",
    "average",
    "retained",
)


def escape(text: str) -> str:
    """Text with everything that LaTeX reads as a command made literal."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def latex(comparison: Comparison) -> str:
    """A `table*` with booktabs' rules: best bold, what is tied with the best underlined.

    It holds the columns that a paper has room for; CSV has the rest. Where one page would not hold
    all rows every budget gets a table of its own.
    """
    fields = [f for f in fields_of(comparison) if f.key.split(":")[0] in COLUMNS]
    groups = groups_of(comparison)
    rows = sum(len(group.entries) for group in groups)
    parts = [groups] if rows <= PAGE else [[group] for group in groups]
    tables = [_table(comparison, fields, part, number) for number, part in enumerate(parts)]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(tables)


def _table(
    comparison: Comparison, fields: Sequence[Field], groups: Sequence[Group], number: int
) -> str:
    head = " & ".join(["Method", *(escape(field.heading) for field in fields)])
    first = ["original", *(field.of_original(comparison.original) for field in fields)]
    body = [" & ".join(map(escape, first)) + r" \\"]
    for group in groups:
        best = leaders(fields, group.ranked)
        body.append(r"\midrule")
        body.append(rf"\multicolumn{{{len(fields) + 1}}}{{l}}{{\emph{{{escape(group.title)}}}}} \\")
        for entry in ordered(comparison, group):
            body.append(" & ".join(_line(group, entry, fields, best)) + r" \\")
    name = "".join(c if c.isalnum() else "-" for c in comparison.name)
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_caption(comparison)}}}",
            rf"\label{{tab:{name}{f'-{number}' if number else ''}}}",
            rf"\begin{{tabular}}{{l{'r' * len(fields)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _line(
    group: Group, entry: Entry, fields: Sequence[Field], best: set[tuple[str, str]]
) -> list[str]:
    name = escape(entry.label + marks(entry.row))
    if entry in group.tied:
        name = rf"\underline{{{name}}}"
    if entry is group.best:
        name = rf"\textbf{{{name}}}"
    if not entry.done:
        span = rf"\multicolumn{{{len(fields)}}}{{l}}{{\emph{{{escape(_reason(entry))}}}}}"
        return [name, span]
    cells = []
    for field in fields:
        text = escape(field.shown(entry))
        cells.append(rf"\textbf{{{text}}}" if (entry.row.key, field.key) in best else text)
    return [name, *cells]


def _reason(entry: Entry) -> str:
    reason = entry.row.reason or ""
    short = reason if len(reason) <= 80 else reason[:79] + "…"
    return f"{entry.row.status}: {short}" if short else entry.row.status


def _caption(comparison: Comparison) -> str:
    one = comparison.calibrations[0] if comparison.calibrations else None
    drawn = f", calibrated on {one.sequences} sequences of {one.length} tokens" if one else ""
    seeds = len(comparison.calibrations)
    drawn += f", mean ± standard deviation over {seeds} draws" if seeds > 1 else ""
    codes = {flag.code for row in comparison.rows for flag in row.flags}
    sentences = [
        f"{comparison.model.name} compressed{drawn}",
        "Sizes are measured on the written files",
        "Best of each budget bold; underlined: not told from it by a paired bootstrap over "
        "windows (95 %)" + (f"; {said}" if (said := doubt(comparison)) else ""),
        *(f"{mark} {text}" for code, (mark, text) in FLAGS.items() if code in codes),
        f"Protocol: {'; '.join(comparison.protocols)}",
        f"Made with mctk {comparison.versions.get('mctk', '')}".rstrip(),
    ]
    return escape(". ".join(sentences) + ".").replace(BEST, "")
