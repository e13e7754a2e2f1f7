"""From what a run and its evaluation found to a row of the comparison."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluate import bootstrap_mean, compare
from ..planning.budget import TOLERANCE
from .file import RowSpec
from .result import (
    Average,
    BankSize,
    Divergence,
    Flag,
    Interval,
    Original,
    Overall,
    Row,
    Scope,
    Sizes,
    Speed,
    Status,
    StepText,
    TaskScore,
    TextScore,
    TracePoint,
)

Data = Mapping[str, Any]
# The figure of a task that papers quote, in this order.
METRICS = ("acc_norm", "acc", "exact_match")
PLAIN = 0.02  # how far the bytes of a plainly stored bank may be from its elements' (positions)


def asked_row(spec: RowSpec, key: str, status: Status = "pending", reason: str = "") -> Row:
    """A row without figures: what is asked, and why nothing came of it."""
    recipe = spec.recipe
    canonical = recipe.canonical()
    steps = [_step(step) for step in canonical["steps"]]
    allocate = canonical["allocate"]
    sequential = recipe.propagate == "compressed"
    flags = []
    if spec.budget is not None and spec.budget.unit == "bytes":
        flags.append(Flag("bytes", "its budget counts bytes"))
    if sequential:
        flags.append(
            Flag("sequential", "calibrated layer by layer on what the compressed layers give")
        )
    return Row(
        name=spec.name,
        label=spec.label,
        family="+".join(dict.fromkeys(step.method.split("/")[0] for step in steps)),
        key=key,
        steps=steps,
        chain=" → ".join(f"{step.method} v{step.version}" for step in steps),
        allocate=f"{allocate['method']} v{allocate['version']}" if allocate else None,
        propagate=recipe.propagate,
        budget=spec.budget,
        seed=spec.seed,
        status=status,
        reason=reason or None,
        flags=flags,
        fingerprint=recipe.fingerprint(),
    )


def finished_row(
    spec: RowSpec,
    key: str,
    path: Path,
    metrics: Data,
    manifest: Data,
    original: Data,
    compressed: Data,
) -> Row:
    """A row with its figures.

    Args:
        spec: What was asked.
        key: Its directory's name.
        path: Its directory.
        metrics: Of its run, as metrics.json holds them.
        manifest: Of its directory.
        original: The original's evaluation.
        compressed: The row's.
    """
    asked = asked_row(spec, key, "ok")
    budget = asked.budget
    layers = metrics["layers"]
    attained, before = metrics["sizes"]["attained"], metrics["sizes"]["original"]
    if budget is not None and budget.unit == "parameters" and not _plain(metrics):
        budget = None
    name, label = spec.called(budget)
    flags = [*asked.flags, *_flags(metrics, compressed)]
    return dataclasses.replace(
        asked,
        name=name,
        label=label,
        budget=budget,
        path=str(path),
        output_kind=metrics["output_kind"],
        sizes=Sizes(**attained),
        scope=_scope(metrics, attained, before),
        texts=texts(compressed, original),
        overall=overall(compressed, original),
        tasks=tasks(compressed),
        average=average(compressed),
        speed=speed(compressed),
        peak_memory_bytes=compressed.get("peak_memory_bytes"),
        seconds={
            "compress": round(sum(layer.get("seconds") or 0.0 for layer in layers), 3),
            "evaluate": round(compressed.get("seconds") or 0.0, 3),
        },
        trace=_trace(layers),
        banks=_banks(metrics, manifest),
        experts_kept={layer["layer"]: list(layer["kept"]) for layer in layers if layer.get("kept")},
        flags=flags,
    )


def original_of(metrics_sizes: Data, evaluation: Data) -> Original:
    """The original with its figures."""
    return Original(
        sizes=Sizes(**metrics_sizes),
        texts=texts(evaluation, None),
        overall=overall(evaluation, None),
        tasks=tasks(evaluation),
        average=average(evaluation),
        speed=speed(evaluation),
        peak_memory_bytes=evaluation.get("peak_memory_bytes"),
    )


def _step(step: Data) -> StepText:
    size = step.get("size")
    shown = None
    if size is not None:
        given = {name: value for name, value in size.items() if value is not None}
        shown = ", ".join(f"{name} {value}" for name, value in given.items()) or "auto"
    return StepText(
        method=step["method"],
        version=step["version"],
        targets=list(step["targets"]),
        layers=step["layers"],
        size=shown,
        options=dict(step["options"]),
    )


def _scope(metrics: Data, attained: Data, before: Data) -> Scope:
    budget = metrics["budget"]
    if budget is not None:
        return Scope(
            budget["of"],
            budget["unit"],
            budget["original"],
            math.floor(budget["allowed"]),
            budget["attained"],
        )
    if before.get("expert_bytes"):
        return Scope("experts", "bytes", before["expert_bytes"], None, attained["expert_bytes"])
    return Scope("model", "bytes", before["bytes"], None, attained["bytes"])


def _plain(metrics: Data) -> bool:
    """Whether the rewritten banks store whole numbers of one width and little else."""
    widths = []
    for layer in metrics["layers"]:
        for bank in (layer.get("banks") or {}).values():
            if bank["parameters"]:
                widths.append(bank["bytes"] / bank["parameters"])
    return all(abs(width - round(width)) < PLAIN * width and width > 1.5 for width in widths)


def _flags(metrics: Data, compressed: Data) -> list[Flag]:
    found = []
    budget = metrics["budget"]
    coarse = budget is not None and budget["shortfall_fraction"] > TOLERANCE
    if coarse:
        short = budget["shortfall_fraction"]
        text = f"its sizes are coarser than the budget: {short:.1%} less than allowed is stored"
        found.append(Flag("coarse", text))
    unseen = sum(
        tokens == 0
        for layer in metrics["layers"]
        for tokens in layer.get("tokens_per_expert") or []
    )
    if unseen:
        text = f"no calibration token reached {unseen} expert{'s' if unseen > 1 else ''}"
        found.append(Flag("few tokens", text))
    for warning in metrics.get("warnings") or []:
        known = (coarse and "too coarse" in warning) or "no calibration token" in warning
        if not known:
            found.append(Flag("warning", warning))
    for warning in compressed.get("warnings") or []:
        code = "not finite" if warning.startswith("perplexity of") else "warning"
        found.append(Flag(code, warning))
    constant = [name for name, task in tasks(compressed).items() if task.constant]
    if constant:
        found.append(Flag("constant answers", f"always the same choice: {', '.join(constant)}"))
    if metrics["gate"] and metrics["gate"].get("fresh_process_equal", True) is None:
        found.append(Flag("gate left out", "too large to be loaded whole for the gate"))
    return found


def texts(evaluation: Data, original: Data | None) -> dict[str, TextScore]:
    """Figures of every text, against the original's if there is one."""
    paired = compare(original, evaluation) if original is not None else {}
    found = {}
    for name, entry in evaluation["perplexity"].items():
        change = paired.get(name)
        found[name] = TextScore(
            perplexity=entry["perplexity"],
            nll=entry["nll"],
            tokens=entry["tokens"],
            windows=entry["windows"],
            protocol=entry["protocol"],
            digest=entry["digest"],
            change=Interval(change["delta_log_ppl"], change["low"], change["high"])
            if change
            else None,
            divergence=_divergence(evaluation["divergence"].get(name)),
            window_nll=entry["window_nll"],
        )
    return found


def _divergence(entry: Data | None) -> Divergence | None:
    if entry is None:
        return None
    return Divergence(
        kl=Interval(**entry["kl"]) if entry["kl"] else None,
        agreement=Interval(**entry["agreement"]),
        tokens=entry["tokens"],
        protocol=entry["protocol"],
    )


def overall(evaluation: Data, original: Data | None) -> Overall | None:
    """All texts together; None if there is no text."""
    after = evaluation["perplexity"]
    if not after:
        return None
    nll = [entry["nll"] for entry in after.values()]
    perplexity = None
    if None not in nll:
        mean = math.fsum(nll) / len(nll)
        perplexity = math.exp(mean) if mean < 700 else None
    change = None
    before = original["perplexity"] if original is not None else {}
    if list(before) == list(after) and all(
        None not in side[name]["window_nll"] and before[name]["digest"] == after[name]["digest"]
        for name in after
        for side in (before, after)
    ):
        groups = []
        for name, entry in after.items():
            pairs = zip(entry["window_nll"], before[name]["window_nll"], strict=True)
            groups.append(([a - b for a, b in pairs], entry["tokens"] / entry["windows"]))
        change = Interval(*bootstrap_mean(groups))
    return Overall(perplexity, change, _all_divergences(evaluation["divergence"]))


def _all_divergences(found: Data) -> Divergence | None:
    entries = list(found.values())
    if not entries:
        return None
    each = [entry["tokens"] / len(entry["window_same"]) for entry in entries]
    same = [(e["window_same"], n) for e, n in zip(entries, each, strict=True)]
    finite = all(None not in entry["window_kl"] for entry in entries)
    kl = [(e["window_kl"], n) for e, n in zip(entries, each, strict=True)]
    return Divergence(
        kl=Interval(*bootstrap_mean(kl)) if finite else None,
        agreement=Interval(*bootstrap_mean(same)),
        tokens=sum(entry["tokens"] for entry in entries),
        protocol=entries[0]["protocol"],
    )


def tasks(evaluation: Data) -> dict[str, TaskScore]:
    """Figures of every task that is no part of a group."""
    found = {}
    for name, entry in evaluation["tasks"].items():
        if entry.get("group") is not None or not entry["metrics"]:
            continue
        metric = next((m for m in METRICS if m in entry["metrics"]), next(iter(entry["metrics"])))
        found[name] = TaskScore(
            metric=metric,
            value=entry["metrics"][metric]["value"],
            stderr=entry["metrics"][metric]["stderr"],
            chance=entry["chance"] if metric.startswith("acc") else None,
            constant=entry["constant"],
            documents=entry["samples"],
            version=entry["version"],
            shots=entry["n_shot"],
        )
    return found


def average(evaluation: Data) -> Average | None:
    """The mean over all tasks; None if there are fewer than two."""
    found = tasks(evaluation)
    if len(found) < 2:
        return None
    chances = [task.chance for task in found.values()]
    known = [chance for chance in chances if chance is not None]
    return Average(
        value=math.fsum(task.value for task in found.values()) / len(found),
        chance=math.fsum(known) / len(known) if len(known) == len(chances) else None,
        tasks=list(found),
    )


def speed(evaluation: Data) -> Speed | None:
    """Tokens per second, if they were measured."""
    found = evaluation.get("speed")
    if found is None:
        return None
    decode = Interval(**found["decode"]) if found["decode"] else None
    return Speed(Interval(**found["prefill"]), decode, found["protocol"])


def _trace(layers: list[Data]) -> list[TracePoint]:
    points = []
    for layer in layers:
        seen: dict[str, float] = {}
        for entry in layer.get("trace") or []:
            seen[entry["step"]] = entry["layer_error"]  # one row a bank: the last has them all
        points += [TracePoint(layer["layer"], step, error) for step, error in seen.items()]
    return points


def _banks(metrics: Data, manifest: Data) -> list[BankSize]:
    settings: dict[tuple[int, str], int] = {}
    for _, layer, bank, setting in manifest.get("sizes") or []:
        if setting is not None and setting >= 0:
            settings[layer, bank] = setting
    return [
        BankSize(
            layer=layer["layer"],
            bank=name,
            setting=settings.get((layer["layer"], name)),
            summary=bank["summary"],
            parameters=bank["parameters"],
            bytes=bank["bytes"],
            original=bank["original"],
            error=bank["relative_weight_error"],
        )
        for layer in metrics["layers"]
        for name, bank in (layer.get("banks") or {}).items()
    ]
