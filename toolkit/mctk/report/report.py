"""report.md: what a run was asked for, what it attained, and what was lost where."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ..recipe import published_command
from .parts import (
    SIZES,
    Metrics,
    methods_of,
    perplexity_table,
    sizes_table,
    tasks_table,
    warnings_of,
)
from .tables import (
    NONE,
    Column,
    Table,
    count,
    document,
    duration,
    get,
    ranges,
    scientific,
    section,
    size,
    text,
    whole,
)

LONG = 40  # rows from which a table is folded away
FEW_EXPERTS = 16  # up to which each expert's tokens are listed


def render_report(metrics: Metrics) -> str:
    """Writes report.md.

    Args:
        metrics: What metrics.json holds; whatever is absent or null is left out.

    Returns:
        GitHub Markdown.
    """
    name = get(metrics, "model", "name")
    return document(
        f"# {name}, compressed" if name else "# A compressed model",
        _summary(metrics),
        section("Warnings", _warnings(metrics)),
        section("Quality", *_quality(metrics)),
        section("Size: prediction and measurement", _prediction(metrics), _budget(metrics)),
        section("Error after each pass", *_trace(metrics)),
        section("What each bank became", _folded(_banks(metrics))),
        section("Experts that stayed", _kept(metrics)),
        section("What the steps noted", _notes(metrics)),
        section("Tokens per expert", *_tokens(metrics)),
        section("Checks on the written files", _gate(metrics)),
        section("How it was made", *_provenance(metrics)),
    )


def _summary(metrics: Metrics) -> str:
    lines = []
    methods = methods_of(metrics)
    if methods:
        lines.append("Steps: " + ", ".join(methods) + ".")
    budget = get(metrics, "budget", "requested")
    if budget:
        lines.append(f"Budget: {budget}.")
    table = sizes_table(metrics)
    return "\n\n".join([" ".join(lines), table.markdown()] if table.rows else [" ".join(lines)])


def _warnings(metrics: Metrics) -> str:
    return "\n".join(f"- {warning}" for warning in warnings_of(metrics))


def _quality(metrics: Metrics) -> list[str]:
    original = get(metrics, "evaluation", "original")
    compressed = get(metrics, "evaluation", "compressed")
    paired = get(metrics, "evaluation", "paired")
    tables = [perplexity_table(original, compressed, paired), tasks_table(original, compressed)]
    return [table.markdown() for table in tables if table.rows]


def _prediction(metrics: Metrics) -> str:
    """Planned beside attained, to the last digit: they must agree, or the plan says "at most"."""
    rows: list[Mapping[str, Any]] = []
    bounds = get(metrics, "sizes", "at_most") or []
    for key, title, _ in SIZES:
        planned = get(metrics, "sizes", "planned", key)
        attained = get(metrics, "sizes", "attained", key)
        if planned is None and attained is None:
            continue
        difference = attained - planned if planned is not None and attained is not None else None
        original = get(metrics, "sizes", "original", key)
        rows.append(
            {
                "what": title,
                "original": original,
                "planned": f"≤ {whole(planned)}" if key in bounds else planned,
                "attained": attained,
                "difference": "equal" if difference == 0 else whole(difference),
            }
        )
    columns = [
        Column("what", "", left=True),
        Column("original", "original", whole),
        Column("planned", "planned", whole),
        Column("attained", "measured", whole),
        Column("difference", "measured less planned"),
    ]
    notes = []
    if bounds:
        notes.append(
            "≤: at most; how many experts a token skips, or which of them share weights, was known "
            "after calibration only."
        )
    return Table(columns, rows, notes).markdown() if rows else ""


def _budget(metrics: Metrics) -> str:
    budget = metrics.get("budget") or {}
    parts = []
    if budget.get("allowed") is not None:
        parts.append(f"allowed {whole(budget['allowed'])}")
    if budget.get("attained") is not None:
        parts.append(f"attained {whole(budget['attained'])}")
    if budget.get("shortfall_fraction") is not None:
        shortfall = 100 * budget["shortfall_fraction"]
        parts.append(f"unused {shortfall:.2f} % of the original")
    known = budget.get("unit") and budget.get("of")
    whose = f" ({budget['unit']} of the {budget['of']})" if known else ""
    return f"Budget{whose}: {', '.join(parts)}." if parts else ""


def _trace(metrics: Metrics) -> list[str]:
    """One row a layer and step; a step that takes bank by bank stands as it left the last one."""
    rows: list[dict[str, Any]] = []
    banks: dict[str, None] = {}
    for layer in metrics.get("layers") or []:
        for entry in get(layer, "trace") or []:
            place = {"layer": get(layer, "layer"), "step": get(entry, "step")}
            bank = text(get(entry, "bank"))
            last = rows[-1] if rows else {}
            if not rows or bank in last or {key: last.get(key) for key in place} != place:
                rows.append(place)
            banks[bank] = None
            rows[-1][bank] = get(entry, "bank_error")
            rows[-1]["layer_error"] = get(entry, "layer_error")
    if not rows:
        return []
    columns = [
        Column("layer", "layer"),
        Column("step", "after step", left=True),
        Column("layer_error", "layer's output", scientific),
        *(Column(bank, bank, scientific) for bank in banks),
    ]
    explanation = (
        "Relative squared error on calibration inputs that each layer kept. Of the layer's output: "
        "over the energy of all that the layer adds to what enters it, attention and shared "
        "experts included. Of each bank's output, while its members still correspond to the "
        "original's: over that output's energy. What a step notes of its own objective (below) may "
        "be over the experts' output alone, and so be larger. "
        'The rows "as stored" include the rounding to the storage dtype.'
    )
    return [explanation, _folded(Table(columns, [*rows]))]


def _banks(metrics: Metrics) -> Table:
    rows: list[Mapping[str, Any]] = []
    for layer in metrics.get("layers") or []:
        for name, bank in (get(layer, "banks") or {}).items():
            rows.append({**(bank or {}), "layer": get(layer, "layer"), "bank": name})
    columns = [
        Column("layer", "layer"),
        Column("bank", "bank", left=True),
        Column("summary", "terms", left=True),
        Column("rank", "rank"),
        Column("parameters", "parameters", count),
        Column("bytes", "bytes", size),
        Column("relative_weight_error", "weights' error", scientific),
    ]
    known = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    return Table(known, rows)


def _kept(metrics: Metrics) -> str:
    """Which of the original's experts a layer still has, where it lost some."""
    rows: list[Mapping[str, Any]] = [
        {"layer": get(layer, "layer"), "count": len(kept), "experts": ranges(kept)}
        for layer in metrics.get("layers") or []
        if (kept := get(layer, "kept"))
    ]
    columns = [
        Column("layer", "layer"),
        Column("count", "experts"),
        Column("experts", "their numbers in the original", left=True),
    ]
    return _folded(Table(columns, rows))


def _notes(metrics: Metrics) -> str:
    """What steps said of each layer while they worked: objectives, choices, fallbacks."""
    rows: list[Mapping[str, Any]] = [
        {"layer": get(layer, "layer"), "step": get(note, "step"), "text": get(note, "text")}
        for layer in metrics.get("layers") or []
        for note in get(layer, "notes") or []
    ]
    columns = [
        Column("layer", "layer"),
        Column("step", "step", left=True),
        Column("text", "", left=True),
    ]
    return _folded(Table(columns, rows))


def _tokens(metrics: Metrics) -> list[str]:
    rows: list[Mapping[str, Any]] = []
    for layer in metrics.get("layers") or []:
        tokens = get(layer, "tokens_per_expert")
        if not tokens:
            continue
        rows.append(
            {
                "layer": get(layer, "layer"),
                "min": min(tokens),
                "median": statistics.median(tokens),
                "max": max(tokens),
                "unused": sum(value == 0 for value in tokens),
                "all": ", ".join(map(whole, tokens)) if len(tokens) <= FEW_EXPERTS else None,
            }
        )
    if not rows:
        return []
    columns = [
        Column("layer", "layer"),
        Column("min", "fewest", whole),
        Column("median", "median", whole),
        Column("max", "most", whole),
        Column("unused", "experts without any"),
    ]
    if any(row["all"] for row in rows):
        columns.append(Column("all", "each", left=True))
    explanation = (
        "Calibration tokens that were routed to each expert. What is fitted to few tokens is "
        "fitted badly."
    )
    return [explanation, _folded(Table(columns, rows))]


def _folded(table: Table) -> str:
    """The table's Markdown, behind a click if it is long; nothing if it is empty."""
    if not table.rows:
        return ""
    body = table.markdown()
    if len(table.rows) < LONG:
        return body
    return f"<details><summary>{len(table.rows)} rows</summary>\n\n{body}\n\n</details>"


def _verdict(value: Any) -> str:
    return "yes" if value is True else "NO" if value is False else "not checked"


def _gate(metrics: Metrics) -> str:
    gate = metrics.get("gate")
    if not gate:
        return ""
    changed = " of ".join(text(get(gate, key)) for key in ("tensors_changed", "tensors_total"))
    rows: list[Mapping[str, Any]] = [
        {
            "what": "streamed forward over the files equals the terms in memory, bit by bit",
            "result": _verdict(get(gate, "streamed_equal")),
        },
        {
            "what": "`from_pretrained` in a fresh process gives the same bits",
            "result": _verdict(get(gate, "fresh_process_equal")),
        },
        {"what": "sizes equal the plan", "result": _verdict(get(gate, "sizes_equal"))},
        {
            "what": "tensors that differ from the original's",
            "result": changed,
        },
    ]
    if get(gate, "plain_error") is not None:
        what = "relative squared error of the logits that transformers gives without mctk"
        rows.append({"what": what, "result": f"{gate['plain_error']:.1e}"})
    if get(gate, "max_abs_logit") is not None:
        rows.append({"what": "largest absolute logit", "result": f"{gate['max_abs_logit']:.3g}"})
    return Table([Column("what", "check", left=True), Column("result", "result")], rows).markdown()


def _provenance(metrics: Metrics) -> list[str]:
    rows: list[Mapping[str, Any]] = []

    def add(what: str, value: Any) -> None:
        if value is not None and value not in ("", NONE):
            rows.append({"what": what, "value": text(value)})

    add("model", get(metrics, "model", "name"))
    add("commit of the model", get(metrics, "model", "commit"))
    add("architecture", get(metrics, "model", "model_type"))
    add("output", metrics.get("output_kind"))
    calibration = metrics.get("calibration") or {}
    if calibration:
        sequences, length = calibration.get("sequences"), calibration.get("length")
        add("calibration", f"{text(sequences)} sequences of {text(length)} tokens")
        add("calibration text", ", ".join(map(str, calibration.get("sources") or [])))
        add("calibration digest", calibration.get("digest"))
    counters = metrics.get("statistics") or {}
    if counters:
        hits, misses = counters.get("cache_hits"), counters.get("cache_misses")
        add("statistics", f"{text(hits)} from the cache, {text(misses)} collected")
        add("forward sweeps", counters.get("sweeps"))
        add("backward sweeps", counters.get("backward_sweeps"))
        add("sweeps on compressed layers", counters.get("compressed_sweeps"))
    seconds = metrics.get("seconds") or {}
    add("time", duration(seconds.get("total")))
    for phase, value in seconds.items():
        if phase != "total":
            add(f"time: {phase}", duration(value))
    phases = [value or 0.0 for phase, value in seconds.items() if phase != "total"]
    rest = (seconds.get("total") or 0.0) - sum(phases)
    if phases and rest > 0:
        add("time: evaluation of the result, and the rest", duration(rest))
    add("peak memory", size(metrics.get("peak_memory_bytes")))
    add("peak memory of the device", size(metrics.get("peak_device_memory_bytes")))
    add("computed", _computed(metrics))
    add("mctk", metrics.get("mctk_version"))
    for name, version in (metrics.get("versions") or {}).items():
        add(name, version)
    columns = [Column("what", "", left=True), Column("value", "", left=True)]
    return [Table(columns, rows).markdown() if rows else "", *recipe_and_command(metrics)]


def _computed(metrics: Metrics) -> str:
    """Device, dtype, threads, system and source in one line; "" of runs that recorded none."""
    found = get(metrics, "environment") or {}
    number = found.get("threads")
    threads = f"{number} thread{'s' * (number > 1)}" if number else None
    cuda = f"CUDA {found['cuda']}" if found.get("cuda") else None
    commit = f"mctk at commit {found['mctk_commit']}" if found.get("mctk_commit") else None
    device = f"on {found['device']}" if found.get("device") else None
    if device and found.get("device_name"):
        device += f" ({found['device_name']})"
    parts = [found.get("dtype"), device, cuda, threads, found.get("platform"), commit]
    return ", ".join(str(part) for part in parts if part)


def recipe_and_command(metrics: Metrics) -> list[str]:
    """The recipe's text and the command, as code blocks."""
    parts = []
    recipe = metrics.get("recipe_text")
    if recipe:
        parts += ["The recipe:", fenced(str(recipe), "yaml")]
    command = metrics.get("command")
    if command:
        parts += ["The command:", fenced(published_command(str(command)), "bash")]
    return parts


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in code:
        fence += "`"
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"
