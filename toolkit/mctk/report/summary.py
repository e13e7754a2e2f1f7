"""What a run prints when it ends, and several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .parts import Metrics, label_of, perplexity_table, sizes_table, tasks_table, warnings_of
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
    warnings = len(warnings_of(metrics))
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
    several = len({get(metrics, "model", "name") for metrics in runs}) > 1
    measured = _Measured()
    own: dict[str, Column] = {}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # an original and its runs
    for index, metrics in enumerate(runs):
        before = get(metrics, "sizes", "original")
        name = get(metrics, "model", "name") or "original"
        key = (name, get(before, "parameters"), get(before, "bytes"))
        if key not in groups:
            groups[key] = [{"model": name if several else "original", **_numbers(before, None)}]
        label = labels[index] if labels else label_of(metrics)
        row = {"model": label, **_numbers(get(metrics, "sizes", "attained"), before)}
        groups[key].append(row)
        for heading, value in (metrics.get("columns") or {}).items():  # of plugins
            own.setdefault(heading, Column(f"plugin:{heading}", heading))
            row[f"plugin:{heading}"] = value
        measured.add(groups[key][0], get(metrics, "evaluation", "original"))
        measured.add(row, get(metrics, "evaluation", "compressed"))
    columns = [
        Column("model", "model", left=True),
        Column("parameters", "parameters", count),
        Column("kept", "kept", percent),
        Column("active_parameters", "active", count),
        Column("bytes", "bytes", size),
        *measured.columns.values(),
        *own.values(),
    ]
    return Table(columns, [row for group in groups.values() for row in group], measured.notes())


class _Measured:
    """Columns of what was measured, and whether the figures of one may be compared.

    Attributes:
        columns: By key of a row.
        references: Protocol and digest of the tokens of each text's first perplexity.
        foreign: Whether a perplexity was measured otherwise.
    """

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.references: dict[str, tuple[Any, Any]] = {}
        self.foreign = False

    def add(self, row: dict[str, Any], result: Any) -> None:
        """Enters one model's evaluation into its row, unless it has been before."""
        for text, entry in (get(result, "perplexity") or {}).items():
            key = f"ppl:{text}"
            self.columns.setdefault(key, Column(key, f"ppl {text} ↓", fixed(3)))
            protocol = (get(entry, "protocol"), get(entry, "digest"))
            same = protocol == self.references.setdefault(text, protocol)
            value = get(entry, "perplexity")
            if not same and value is not None:
                self.foreign = True
                value = f"{value:.3f} †"
            row.setdefault(key, value)
        for task, entry in (get(result, "tasks") or {}).items():
            metric = _main_metric(get(entry, "metrics") or {})
            if metric is None or get(entry, "group") is not None:
                continue
            key = f"{metric}:{task}"
            self.columns.setdefault(key, Column(key, f"{task} {metric} ↑", fixed(4)))
            row.setdefault(key, get(entry, "metrics", metric, "value"))

    def notes(self) -> list[str]:
        """Sentences below the table."""
        protocols = dict.fromkeys(name for name, _ in self.references.values() if name)
        notes = [f"ppl: {name}." for name in protocols]
        if self.foreign:
            notes.append("† Measured on other tokens or by another protocol: not comparable.")
        return notes


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
