"""What the page says of a single row: steps, sizes, figures with intervals, layers and banks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..report.tables import NONE, duration, fixed, percent, scientific, size, whole
from .fields import perplexity, rate
from .result import Comparison, Interval, Row, StepText
from .scores import DOUBT, FEW, compared_windows
from .standing import Entry


def details_of(comparison: Comparison, entry: Entry, anchor: str) -> str:
    """Everything known of an entry, folded away.

    Args:
        comparison: What it belongs to.
        entry: A method at one budget; of several seeds each has its own part.
        anchor: The element's id.
    """
    parts = []
    for row in entry.rows:
        if len(entry.rows) > 1:
            parts.append(f"<h3>seed {row.seed}</h3>")
        parts += [
            _flags(row),
            _facts(row),
            f"<h3>Steps</h3><pre>{escape(steps_as_yaml(row.steps))}</pre>",
            _texts(comparison, row),
            _tasks(comparison, row),
            _speed(row),
            _trace(row),
            _banks(row),
            _kept(row),
        ]
    status = "" if entry.done else f" ({entry.row.status})"
    return (
        f'<details id="{anchor}"><summary>{escape(entry.label + status)}</summary>'
        + "".join(parts)
        + "</details>"
    )


def steps_as_yaml(steps: Sequence[StepText]) -> str:
    """Steps as a recipe lists them, with the methods' versions."""
    lines = []
    for step in steps:
        stage, _, name = step.method.partition("/")
        line: dict[str, Any] = {stage: name, "version": step.version, "targets": step.targets}
        line["layers"] = step.layers
        if step.size is not None:
            line["size"] = step.size
        if step.options:
            line["options"] = step.options
        lines.append(line)
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _flags(row: Row) -> str:
    said = [flag.text for flag in row.flags]
    if row.status != "ok":
        said.insert(0, f"{row.status}: {row.reason or 'no reason was given'}")
    items = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(said))
    return f"<ul>{items}</ul>" if items else ""


def _facts(row: Row) -> str:
    facts: list[tuple[str, str]] = [("methods", row.chain)]
    if row.allocate:
        facts.append(("allocated by", row.allocate))
    facts.append(("calibrated on", f"activations of the {row.propagate} prefix, seed {row.seed}"))
    scope = row.scope
    if scope:
        allowed = f", allowed {whole(scope.allowed)}" if scope.allowed is not None else ""
        share = f" ({scope.attained / scope.original:.2%})" if scope.original else ""
        words = f"{whole(scope.attained)} of {whole(scope.original)} {scope.unit}{share}{allowed}"
        facts.append((f"stored of the {scope.of}", words))
    if row.sizes:
        sizes = row.sizes
        facts += [
            ("parameters", whole(sizes.parameters)),
            ("active a token", whole(sizes.active_parameters)),
            ("FLOPs a token", whole(sizes.flops_per_token)),
            ("bytes", f"{whole(sizes.bytes)} ({size(sizes.bytes)})"),
        ]
    if row.peak_memory_bytes is not None:
        facts.append(("peak memory", size(row.peak_memory_bytes)))
    if row.seconds:
        spent = ", ".join(f"{what} {duration(value)}" for what, value in row.seconds.items())
        facts.append(("own work", spent))
    if row.output_kind:
        facts.append(("output", row.output_kind))
    if row.path:
        facts.append(("directory", f"rows/{Path(row.path).name}"))
    if row.fingerprint:
        facts.append(("fingerprint", row.fingerprint[:16]))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    return f'<dl class="facts">{listed}</dl>'


def _texts(comparison: Comparison, row: Row) -> str:
    lines = []
    for name, text in row.texts.items():
        before = comparison.original.texts.get(name)
        far = text.divergence
        lines.append(
            [
                name,
                perplexity(before.perplexity if before else None),
                perplexity(text.perplexity),
                _interval(text.change, fixed(4, sign=True), text.windows),
                _interval(far.kl if far else None, scientific, compared_windows(text)),
                _interval(far.agreement if far else None, percent, compared_windows(text)),
            ]
        )
    head = ["text", "original", "perplexity", "Δ log-perplexity [95 %]", "KL", "agreement"]
    return _table("Texts", head, lines)


def _tasks(comparison: Comparison, row: Row) -> str:
    lines = []
    for name, task in row.tasks.items():
        before = comparison.original.tasks.get(name)
        error = f" ± {task.stderr:.4f}" if task.stderr is not None else ""
        lines.append(
            [
                name,
                task.metric,
                fixed(4)(before.value) if before else NONE,
                fixed(4)(task.value) + error + (" (one constant answer)" if task.constant else ""),
                fixed(4)(task.chance),
                whole(task.documents),
            ]
        )
    return _table("Tasks", ["task", "metric", "original", "value", "chance", "documents"], lines)


def _speed(row: Row) -> str:
    if row.speed is None:
        return ""
    lines = [["prefill", _interval(row.speed.prefill, rate)]]
    if row.speed.decode:
        lines.append(["decode", _interval(row.speed.decode, rate)])
    return _table("Tokens per second", ["", "median [least, most]"], lines)


def _trace(row: Row) -> str:
    steps = list(dict.fromkeys(point.step for point in row.trace))
    found = {(point.layer, point.step): point.error for point in row.trace}
    lines = [
        [str(layer), *(scientific(found.get((layer, step))) for step in steps)]
        for layer in sorted({point.layer for point in row.trace})
    ]
    return _table("Error of each layer's output after each pass", ["layer", *steps], lines)


def _banks(row: Row) -> str:
    lines = [
        [
            str(bank.layer),
            bank.bank,
            bank.summary,
            NONE if bank.setting is None else str(bank.setting),
            percent(bank.parameters / bank.original) if bank.original else NONE,
            size(bank.bytes),
            scientific(bank.error),
        ]
        for bank in row.banks
    ]
    head = ["layer", "bank", "terms", "size chosen", "parameters kept", "bytes", "weights' error"]
    return _table("What each bank became", head, lines, left={1, 2})


def _kept(row: Row) -> str:
    lines = [[str(k), ", ".join(map(str, v))] for k, v in sorted(row.experts_kept.items())]
    return _table("Experts that stay", ["layer", "experts"], lines, left={1})


def _interval(found: Interval | None, form: Any, windows: int | None = None) -> str:
    """A figure with its bounds; marked where those come from too few windows."""
    if found is None:
        return NONE
    if found.low is None or found.high is None:
        return str(form(found.value))
    mark = DOUBT if windows is not None and windows < FEW else ""
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]{mark}"


def _table(
    title: str,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    left: Collection[int] = (),
) -> str:
    if not lines:
        return ""
    heads = "".join(
        f'<th scope="col"{" class=left" if i in left else ""}>{escape(word)}</th>'
        for i, word in enumerate(head)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>'
            if i == 0
            else f"<td{' class=left' if i in left else ''}>{escape(cell)}</td>"
            for i, cell in enumerate(line)
        )
        + "</tr>"
        for line in lines
    )
    return (
        f'<h3>{escape(title)}</h3><div class="wide"><table class="plain">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
