"""A comparison as CSV: every raw figure, for spreadsheets and scripts."""

from __future__ import annotations

import csv as writer_of_csv
import io
from typing import Any

from .fields import final_errors, kept
from .result import Comparison, Interval, Row
from .standing import Subject, score


def csv(comparison: Comparison) -> str:
    """Every raw figure, one line a row and seed, the original first; what is missing is empty."""
    lines = [_raw(comparison, comparison.original)]
    lines += [_raw(comparison, row) for row in comparison.rows]
    keys = list(dict.fromkeys(key for line in lines for key in line))
    buffer = io.StringIO()
    writer = writer_of_csv.DictWriter(buffer, keys, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "" if v is None else v for k, v in line.items()})
    return buffer.getvalue()


def _raw(comparison: Comparison, subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(subject, Row):
        budget = subject.budget
        found |= {
            "name": subject.name,
            "label": subject.label,
            "family": subject.family,
            "key": subject.key,
            "chain": subject.chain,
            "allocate": subject.allocate,
            "propagate": subject.propagate,
            "remove": budget.remove if budget else None,
            "of": budget.of if budget else None,
            "unit": budget.unit if budget else None,
            "seed": subject.seed,
            "status": subject.status,
            "reason": subject.reason,
            "output_kind": subject.output_kind,
            "flags": "; ".join(flag.code for flag in subject.flags),
            "scope_original": subject.scope.original if subject.scope else None,
            "scope_allowed": subject.scope.allowed if subject.scope else None,
            "scope_attained": subject.scope.attained if subject.scope else None,
        }
    else:
        found |= {"name": "original", "label": "original", "status": "ok"}
    for key in (
        "parameters",
        "active_parameters",
        "bytes",
        "macs_per_token",
        "flops_per_token",
        "expert_parameters",
        "expert_bytes",
    ):
        found[key] = getattr(subject.sizes, key) if subject.sizes else None
    whole = comparison.original.sizes.bytes
    found["kept"] = kept(comparison)(subject)
    found["bytes_share"] = subject.sizes.bytes / whole if subject.sizes else None
    for name, text in subject.texts.items():
        found |= {
            f"perplexity:{name}": text.perplexity,
            f"nll:{name}": text.nll,
            f"tokens:{name}": text.tokens,
            f"windows:{name}": text.windows,
            **_interval(f"change:{name}", text.change),
        }
        if text.divergence:
            found |= _interval(f"kl:{name}", text.divergence.kl)
            found |= _interval(f"agreement:{name}", text.divergence.agreement)
    if subject.overall:
        found["perplexity"] = subject.overall.perplexity
        found |= _interval("change", subject.overall.change)
        if subject.overall.divergence:
            found |= _interval("kl", subject.overall.divergence.kl)
            found |= _interval("agreement", subject.overall.divergence.agreement)
    if isinstance(subject, Row) and "change" not in found:
        found["change"] = score(comparison, subject)
    for name, task in subject.tasks.items():
        found |= {
            f"task:{name}": task.value,
            f"stderr:{name}": task.stderr,
            f"chance:{name}": task.chance,
        }
    if subject.average:
        found |= {"average": subject.average.value, "average_chance": subject.average.chance}
    if subject.speed:
        found |= _interval("prefill", subject.speed.prefill)
        found |= _interval("decode", subject.speed.decode)
    found["peak_memory_bytes"] = subject.peak_memory_bytes
    if isinstance(subject, Row):
        errors = final_errors(subject, comparison.model.layers)
        found |= {f"seconds:{what}": value for what, value in subject.seconds.items()}
        found |= {f"layer_error:{k}": v for k, v in errors.items()}
    return found


def _interval(key: str, found: Interval | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {key: found.value, f"{key}:low": found.low, f"{key}:high": found.high}
