"""What stands below a comparison's tables: marks, failures, methods, protocol, versions."""

from __future__ import annotations

from collections.abc import Sequence

from ..report.tables import duration
from .result import Comparison, Row
from .standing import Entry, Group, difference

BEST, TIED, FRONTIER = "★", "≈", "◆"
# What a flag's code means for the reader, and the mark behind a row's name that points to it.
FLAGS = {
    "coarse": ("†", "stores less than its budget allows: the method's sizes are coarser"),
    "bytes": ("‡", "has packed or sparse terms: compare it by bytes"),
    "sequential": ("§", "calibrated on its own compressed prefix, a sweep of its own"),
    "few tokens": ("¶", "experts that hardly any calibration token reached"),
    "not finite": ("♯", "a figure is not finite"),
    "constant answers": ("⊙", "gave one choice for every document of a task"),
    "gate left out": ("∘", "its files were not checked against the terms in memory"),
}


def marks(row: Row) -> str:
    """The marks of a row's flags."""
    codes = {flag.code for flag in row.flags}
    return "".join(mark for code, (mark, _) in FLAGS.items() if code in codes)


def standing(group: Group, entry: Entry) -> str:
    """The mark before an entry's name: best of its budget, or tied with it."""
    return BEST if entry is group.best else TIED if entry in group.tied else ""


def legend(comparison: Comparison, groups: Sequence[Group]) -> list[str]:
    """What the marks mean that occur, a sentence each."""
    lines = []
    if any(group.best for group in groups):
        lines.append(f"{BEST} best of its budget by Δ log-ppl")
    if any(group.tied for group in groups):
        lines.append(
            f"{TIED} not told from the best: the 95 % interval of their difference on the same "
            "windows holds 0"
            + (", or seeds differ by more" if len(comparison.calibrations) > 1 else "")
        )
    if any(row.sizes for row in comparison.rows):
        lines.append(f"{FRONTIER} on the byte frontier: no row has as few bytes and is better")
    codes = {flag.code for row in comparison.rows for flag in row.flags}
    lines += [f"{mark} {text}" for code, (mark, text) in FLAGS.items() if code in codes]
    if len(comparison.calibrations) > 1:
        lines.append(
            f"mean ± standard deviation over {len(comparison.calibrations)} calibrations; "
            "intervals are those of the texts alone"
        )
    return lines


def failures(groups: Sequence[Group]) -> list[str]:
    """Every row without figures, with its reason; seeds that say the same together."""
    lines = []
    for group in groups:
        for entry in group.entries:
            said: dict[str, list[int]] = {}
            for row in entry.rows:
                if row.status in ("failed", "refused"):
                    reason = f": {row.reason}" if row.reason else ""
                    said.setdefault(row.status + reason, []).append(row.seed)
            for what, seeds in said.items():
                which = f", seeds {', '.join(map(str, seeds))}" if len(entry.rows) > 1 else ""
                place = group.title[0].lower() + group.title[1:]
                lines.append(f"{entry.label}, {place}{which}: {what}")
    return lines


def lead(comparison: Comparison, group: Group) -> str | None:
    """By how much the best leads the first that it is told from, or None."""
    if group.best is None:
        return None
    others = [e for e in group.entries if e is not group.best and e not in group.tied and e.done]
    gaps = [(difference(comparison, group.best.done, e.done), e) for e in others]
    known = [(gap, entry) for gap, entry in gaps if gap is not None and gap.low is not None]
    if not known:
        return None
    gap, entry = min(known, key=lambda pair: pair[0].value)
    return (
        f"{group.best.label} leads {entry.label} by {gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]"
    )


def methods(comparison: Comparison) -> list[tuple[str, str]]:
    """Each row's name and the chain of its methods with versions, once."""
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        chains = found.setdefault(row.label, [])
        text = row.chain + (f" ({row.allocate})" if row.allocate else "")
        if text not in chains:
            chains.append(text)
    return [(label, "; ".join(chains)) for label, chains in found.items()]


def protocol(comparison: Comparison) -> list[str]:
    """How everything was measured, a sentence each."""
    model = comparison.model
    shape = f"{model.layers} layers"
    if model.experts:
        shape += f", {model.experts} experts of which a token passes {model.experts_per_token}"
    lines = [
        f"Model: {model.name} ({model.model_type}, {shape}), fingerprint {model.fingerprint[:12]}"
    ]
    for one in comparison.calibrations:
        digest = f", digest {one.digest[:12]}" if one.digest else ""
        sources = ", ".join(one.sources)
        lines.append(
            f"Calibration, seed {one.seed}: {one.sequences} sequences of {one.length} tokens"
            + (f" of {sources}" if sources else "")
            + digest
        )
    if comparison.protocols:
        lines.append("Measured: " + "; ".join(comparison.protocols))
    lines.append(f"Computed in {comparison.dtype} on {comparison.device}")
    if comparison.seconds:
        spent = ", ".join(f"{what} {duration(value)}" for what, value in comparison.seconds.items())
        lines.append(f"Time that rows share: {spent}")
    if comparison.versions:
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in comparison.versions.items()))
    if comparison.made:
        lines.append(f"Made: {comparison.made}")
    if not comparison.finished:
        left = sum(row.status == "pending" for row in comparison.rows)
        lines.append(f"Not finished: {left} rows are pending; the same command goes on")
    return lines
