"""What a run prints when it ends, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .parts import Metrics, label_of, perplexity_table, sizes_table, tasks_table
from .tables import Column, Table, count, duration, fixed, get, percent, size


def render_summary(metrics: Metrics, directory: str | None = None) -> str:
    """A few lines for the terminal.

    Args:
        metrics: What metrics.json holds.
        directory: Where the run's files are, to be named at the end.
    """
    original = get(metrics, "evaluation", "original")
    compressed = get(metrics, "evaluation", "compressed")
    tables = [
        sizes_table(metrics),
        perplexity_table(original, compressed, get(metrics, "evaluation", "paired")),
        tasks_table(original, compressed),
    ]
    parts = [label_of(metrics), *(table.markdown() for table in tables if table.rows)]
    warnings = len(metrics.get("warnings") or [])
    closing = []
    total = get(metrics, "seconds", "total")
    if total is not None:
        closing.append(f"took {duration(total)}")
    if metrics.get("peak_memory_bytes") is not None:
        closing.append(f"peak memory {size(metrics['peak_memory_bytes'])}")
    if warnings:
        closing.append(f"{warnings} warning{'s' if warnings > 1 else ''}, see report.md")
    if directory:
        closing.append(f"in {directory}")
    if closing:
        parts.append("; ".join(closing))
    return "\n\n".join(parts)


def side_by_side(runs: Sequence[Metrics], labels: Sequence[str] | None = None) -> Table:
    """Finished runs in one table, each original once and on top of its runs.

    Perplexities stand in one column only if they were measured on the same tokens by the same
    protocol; one that was not is marked.

    Args:
        runs: The runs' metrics.
        labels: What to call them; by default their methods and budget.

    Returns:
        One row a model: parameters stored and active, bytes, perplexity of each text set, accuracy
        of each task.
    """
    texts: dict[str, None] = {}
    tasks: dict[tuple[str, str], None] = {}
    rows: list[dict[str, Any]] = []
    originals: dict[tuple[Any, ...], dict[str, Any]] = {}
    references: dict[str, tuple[Any, Any]] = {}
    foreign = False
    for index, metrics in enumerate(runs):
        before = get(metrics, "sizes", "original")
        evaluation = get(metrics, "evaluation", "original")
        name = get(metrics, "model", "name") or "original"
        key = (name, get(before, "parameters"), get(before, "bytes"))
        if key not in originals:
            originals[key] = {"model": name if _several(runs) else "original", "kept": None}
            originals[key] |= _numbers(before, None)
            rows.append(originals[key])
        label = labels[index] if labels else label_of(metrics)
        row = {"model": label, **_numbers(get(metrics, "sizes", "attained"), before)}
        place = max(i for i, r in enumerate(rows) if r.get("_group", id(r)) == id(originals[key]))
        row["_group"] = id(originals[key])
        rows.insert(place + 1, row)
        for target, result in (
            (originals[key], evaluation),
            (row, get(metrics, "evaluation", "compressed")),
        ):
            for text, entry in (get(result, "perplexity") or {}).items():
                texts[text] = None
                measured = (get(entry, "protocol"), get(entry, "digest"))
                same = measured == references.setdefault(text, measured)
                foreign |= not same
                value = get(entry, "perplexity")
                shown = value if same or value is None else f"{value:.3f} †"
                target.setdefault(f"ppl:{text}", shown)
            for task, entry in (get(result, "tasks") or {}).items():
                metric = _main_metric(get(entry, "metrics") or {})
                if metric is None or get(entry, "group") is not None:
                    continue
                tasks[task, metric] = None
                target.setdefault(f"{metric}:{task}", get(entry, "metrics", metric, "value"))
    for row in rows:
        row.pop("_group", None)
    columns = [
        Column("model", "model", left=True),
        Column("parameters", "parameters", count),
        Column("kept", "kept", percent),
        Column("active_parameters", "active", count),
        Column("bytes", "bytes", size),
        *(Column(f"ppl:{text}", f"ppl {text} ↓", fixed(3)) for text in texts),
        *(Column(f"{metric}:{task}", f"{task} {metric} ↑", fixed(4)) for task, metric in tasks),
    ]
    protocols = dict.fromkeys(protocol for protocol, _ in references.values() if protocol)
    notes = [f"ppl: {protocol}." for protocol in protocols]
    if foreign:
        notes.append("† Measured on other tokens or by another protocol: not comparable.")
    return Table(columns, list(rows), notes)


def _several(runs: Sequence[Metrics]) -> bool:
    """Whether the runs start from more than one model."""
    return len({get(metrics, "model", "name") for metrics in runs}) > 1


def _numbers(sizes: Any, original: Any) -> dict[str, Any]:
    """Sizes of one row, and the part of the original's parameters that it keeps."""
    values: Mapping[str, Any] = sizes or {}
    row = {key: values.get(key) for key in ("parameters", "active_parameters", "bytes")}
    whole, kept = get(original, "parameters"), row["parameters"]
    return {**row, "kept": kept / whole if whole and kept is not None else None}


def _main_metric(metrics: Mapping[str, Any]) -> str | None:
    """The figure that papers quote: length-normalised accuracy where there is one."""
    for name in ("acc_norm", "acc", "exact_match"):
        if name in metrics:
            return name
    return next(iter(metrics), None)
