"""Tables that the report, the model card and the terminal share; each from the metrics alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import (
    NONE,
    Column,
    Format,
    Table,
    count,
    fixed,
    get,
    percent,
    size,
    text,
)

Metrics = Mapping[str, Any]

SIZES: list[tuple[str, str, Format]] = [
    ("parameters", "stored parameters", count),
    ("expert_parameters", "of which in experts", count),
    ("active_parameters", "active parameters per token", count),
    ("macs_per_token", "multiply-adds per token", count),
    ("bytes", "bytes", size),
]


NAMES = ("original", "compressed")  # what is compared, unless a table says otherwise


def method_of(step: Any) -> str:
    """What a recipe's step does: "decompose svdllm"."""
    return text(get(step, "method")).replace("/", " ")


def methods_of(metrics: Metrics) -> list[str]:
    """What each step of the recipe does, in order."""
    steps = get(metrics, "recipe", "steps") or []
    return [method_of(step) for step in steps]


def label_of(metrics: Metrics) -> str:
    """What to call a run in a table: its methods, its budget and who shared that out."""
    methods = " + ".join(name.split(" ", 1)[-1] for name in methods_of(metrics)) or "compressed"
    budget = get(metrics, "budget", "requested")
    allocator = get(metrics, "recipe", "allocate", "method")
    by = f", {allocator.split('/')[-1]}" if isinstance(allocator, str) else ""
    return f"{methods}, {budget}{by}" if budget else methods


def warnings_of(metrics: Metrics) -> list[str]:
    """Everything that the run, its layers and its evaluation warned of, each once."""
    found = [str(warning) for warning in metrics.get("warnings") or []]
    for layer in metrics.get("layers") or []:
        index = text(get(layer, "layer"))
        found += [f"layer {index}: {warning}" for warning in get(layer, "warnings") or []]
    for side in ("original", "compressed"):
        said = get(metrics, "evaluation", side, "warnings") or []
        found += [f"evaluation of the {side} model: {warning}" for warning in said]
    return list(dict.fromkeys(found))


def sizes_table(metrics: Metrics) -> Table:
    """Original and attained sizes, one row a quantity."""
    rows: list[Mapping[str, Any]] = []
    for key, title, form in SIZES:
        before = get(metrics, "sizes", "original", key)
        after = get(metrics, "sizes", "attained", key)
        if before is None and after is None:
            continue
        kept = after / before if before and after is not None else None
        rows.append({"what": title, "before": form(before), "after": form(after), "kept": kept})
    unread = get(metrics, "unread", "parts") or []
    if unread:  # what is left out of these is no method's saving
        before = sum(part["parameters"] for part in unread)
        after = sum(part["parameters"] for part in unread if part["kept"])
        title = "of which not read with the model (" + ", ".join(p["what"] for p in unread) + ")"
        kept = after / before if before else None
        rows.append({"what": title, "before": count(before), "after": count(after), "kept": kept})
    columns = [
        Column("what", "", left=True),
        Column("before", "original"),
        Column("after", "compressed"),
        Column("kept", "kept", percent),
    ]
    return Table(columns, rows)


def interval(entry: Any) -> str:
    """A difference with its 95 % interval."""
    if get(entry, "delta_log_ppl") is None:
        return NONE
    signed = fixed(4, sign=True)
    low, high = signed(get(entry, "low")), signed(get(entry, "high"))
    return f"{signed(entry['delta_log_ppl'])} [{low}, {high}]"


def perplexity_table(
    original: Metrics | None,
    compressed: Metrics | None,
    paired: Metrics | None,
    names: tuple[str, str] = NAMES,
) -> Table:
    """Token perplexity of each text set; `original` may be absent; `names` head the columns."""
    before = get(original, "perplexity") or {}
    after = get(compressed, "perplexity") or {}
    columns = [Column("text", "text", left=True)]
    if before:
        columns.append(Column("before", f"{names[0]} ↓", fixed(3)))
    columns.append(Column("after", f"{names[1]} ↓" if before else "perplexity ↓", fixed(3)))
    if before:
        columns.append(Column("ratio", "ratio", fixed(3)))
    if paired:
        columns.append(Column("delta", "Δ log-perplexity [95 %]"))
    columns.append(Column("tokens", "tokens", count))
    rows: list[Mapping[str, Any]] = []
    protocols: dict[str, None] = {}
    for name in [*before, *(name for name in after if name not in before)]:
        first, second = get(before, name, "perplexity"), get(after, name, "perplexity")
        rows.append(
            {
                "text": name,
                "before": first,
                "after": second,
                "ratio": second / first if first and second is not None else None,
                "delta": interval(get(paired, name)),
                "tokens": get(after, name, "tokens") or get(before, name, "tokens"),
            }
        )
        for protocol in (get(before, name, "protocol"), get(after, name, "protocol")):
            if protocol:
                protocols[protocol] = None
    dtype, device = get(compressed, "dtype"), get(compressed, "device")
    computed = f", computed in {dtype} on {device}" if dtype and device else ""
    notes = [f"Protocol: {', '.join(protocols)}{computed}."] if protocols else []
    if paired:
        notes.append(
            f"Δ log-perplexity: {names[1]} less {names[0]} on the same windows; the interval is a "
            "paired bootstrap over windows."
        )
    return Table(columns, rows, notes)


def _accuracy(entry: Any, metric: str) -> str:
    value = get(entry, "metrics", metric, "value")
    if value is None:
        return NONE
    stderr = get(entry, "metrics", metric, "stderr")
    shown = fixed(4)(value) + (f" ± {stderr:.4f}" if stderr is not None else "")
    return shown + (" ‡" if get(entry, "constant") else "")


def tasks_table(
    original: Metrics | None, compressed: Metrics | None, names: tuple[str, str] = NAMES
) -> Table:
    """lm-eval's tasks; the parts of a group are left to metrics.json."""
    before, after = get(original, "tasks") or {}, get(compressed, "tasks") or {}
    columns = [
        Column("task", "task", left=True),
        Column("version", "version"),
        Column("n_shot", "n-shot"),
        Column("metric", "metric", left=True),
    ]
    if before:
        columns.append(Column("before", names[0]))
    columns.append(Column("after", names[1] if before else "value"))
    columns.append(Column("chance", "chance", fixed(4)))
    columns.append(Column("samples", "documents"))
    rows: list[Mapping[str, Any]] = []
    for name in [*before, *(name for name in after if name not in before)]:
        entry = after.get(name) or before.get(name)
        if get(entry, "group") is not None:
            continue
        found = {**(get(before, name, "metrics") or {}), **(get(after, name, "metrics") or {})}
        for metric in found:
            rows.append(
                {
                    "task": name,
                    "version": get(entry, "version"),
                    "n_shot": get(entry, "n_shot"),
                    "metric": metric,
                    "before": _accuracy(before.get(name), metric),
                    "after": _accuracy(after.get(name), metric),
                    "chance": get(entry, "chance") if metric.startswith("acc") else None,
                    "samples": get(entry, "samples"),
                }
            )
    table = Table(columns, rows)
    if any("‡" in row["before"] + row["after"] for row in rows):
        table.notes.append("‡ The model gave the same choice for every document.")
    return table
