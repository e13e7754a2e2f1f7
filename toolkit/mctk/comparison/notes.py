"""What stands below a comparison's tables: marks, failures, methods, protocol, versions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..report.tables import duration
from .result import Comparison, Row
from .scores import DOUBT, few_windows
from .standing import NEAR, Entry, Group, difference

BEST, TIED, FRONTIER = "★", "≈", "◆"
# What a flag's code means for the reader, and the mark behind a row's name that points to it.
FLAGS = {
    "coarse": ("†", "stores less than its budget allows: the method's sizes are coarser"),
    "bytes": (
        "‡",
        "its budget counts bytes, positions and scales included: it is ranked only among its like",
    ),
    "sequential": ("§", "calibrated on its own compressed prefix, a sweep of its own"),
    "few tokens": ("¶", "experts that hardly any calibration token reached"),
    "not finite": ("♯", "a figure is not finite"),
    "constant answers": ("⊙", "gave one choice for every document of a task"),
    "gate left out": ("∘", "its files were checked layer by layer only, not loaded as a whole"),
}
# Phases that are the work of single rows; all others serve all of them.
OWN = ("compress", "gate", "evaluate", "speed")


def marks(row: Row) -> str:
    """The marks of a row's flags."""
    codes = {flag.code for flag in row.flags}
    return "".join(mark for code, (mark, _) in FLAGS.items() if code in codes)


def doubt(comparison: Comparison) -> str | None:
    """What to say of intervals from few windows, without the mark; None where there are enough."""
    fewest = few_windows(comparison.original.texts)
    if fewest is None:
        return None
    return (
        f"interval from {fewest} window{'s' if fewest > 1 else ''} of a text: too few, it is too "
        "narrow; do not rely on it, nor on what it tells apart (≈)"
    )


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
        lines.append(
            f"{FRONTIER} on the byte frontier: smaller than every better row by more than "
            f"{100 * NEAR:g} % of the original's bytes"
        )
    codes = {flag.code for row in comparison.rows for flag in row.flags}
    lines += [f"{mark} {text}" for code, (mark, text) in FLAGS.items() if code in codes]
    if said := doubt(comparison):
        lines.append(f"{DOUBT} {said}")
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


def winner(comparison: Comparison, group: Group, write: Callable[[str], str] = str) -> str | None:
    """Who is best in a group, who cannot be told from it, and how far behind the next one is.

    Args:
        comparison: The comparison.
        group: One of its groups.
        write: Makes a label literal in the output's language.

    Returns:
        A sentence without its stop; None where nobody is best.
    """
    if group.best is None:
        return None
    said = f"{write(group.best.label)} is best"
    if group.tied:
        said += f", not told from it: {', '.join(write(entry.label) for entry in group.tied)}"
    others = [e for e in group.ranked if e is not group.best and e not in group.tied and e.done]
    gaps = [(difference(comparison, group.best.done, e.done), e) for e in others]
    known = [(gap, entry) for gap, entry in gaps if gap is not None and gap.low is not None]
    if not known:
        return said
    gap, entry = min(known, key=lambda pair: pair[0].value)
    mark = DOUBT if few_windows(comparison.original.texts) else ""
    behind = f"{gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]{mark}"
    return f"{said}; next is {write(entry.label)}, behind by {behind}"


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
    lines += spent(comparison)
    if comparison.versions:
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in comparison.versions.items()))
    if comparison.made:
        lines.append(f"Made: {comparison.made}")
    if not comparison.finished:
        left = sum(row.status == "pending" for row in comparison.rows)
        lines.append(f"Not finished: {left} rows are pending; the same command goes on")
    return lines


def spent(comparison: Comparison) -> list[str]:
    """Time that rows share, that of single rows, and the clock's, a sentence each."""

    def listed(phases: dict[str, float]) -> str:
        return ", ".join(f"{what} {duration(value)}" for what, value in phases.items())

    rest = {name: value for name, value in comparison.seconds.items() if name != "total"}
    shared = {name: value for name, value in rest.items() if name not in OWN}
    own = {name: value for name, value in rest.items() if name in OWN}
    calls = comparison.calls
    over = "" if calls == 1 else f", {calls} calls together" if calls else ", all calls together"
    lines = [f"Time that rows share{over}: {listed(shared)}"] if shared else []
    if own:
        lines.append(f"Time for single rows{over}: {listed(own)}")
    if "total" in comparison.seconds:
        clock = duration(comparison.seconds["total"])
        lines.append(f"By the clock{over}: {clock}, up to where tables and figures are drawn")
    return lines
