"""Products of rows that are sorted by expert with the terms of their experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..terms import Dense, LowRank, PackedTensor, Term
from ..terms.indices import of_slot, take_columns
from .rows import Rows, Segment

# On a CPU the loop over experts is as fast (measured with 8 and 64 experts), takes every rank and
# adds into its result; on an accelerator each step of a loop is a launch.
GROUPED_ON = {"cuda"}
_ALIGNED = 16  # bytes: what a grouped product asks of rows


def on_segments(
    x: Tensor, segments: Sequence[Segment], function: Callable[[Tensor, int], Tensor], width: int
) -> Tensor:
    """Applies a function of (rows, member) to each segment of ``x [n, in]``; ``[n, width]``."""
    if len(segments) == 1 and segments[0].stop == x.shape[0]:
        return function(x, segments[0].expert)
    parts = [function(x[s.start : s.stop], s.expert) for s in segments]
    return torch.cat(parts) if parts else x.new_zeros(0, width)


def add_shared(out: Tensor, term: Term, x: Tensor, member: int, first: bool) -> None:
    """Adds a term's outputs for ``x [n, in]`` to ``out [n, out]``; `first`: that is zero still."""
    slot = term.slots[member]
    if not first or type(term) is not Dense or slot is None:
        out.add_(term.apply(x, member))
        return
    # Without the way over a matrix with all rows.
    part = F.linear(take_columns(x, term.cols, slot), term.weight[slot])
    if term.rows is None:
        out.copy_(part)
    else:
        out.scatter_(1, of_slot(term.rows, slot).expand(part.shape), part)


def inner_by_rows(term: LowRank, x: Tensor, rows: Rows) -> Tensor:
    """Returns each row's ``V_e x``, ``[n, in]`` → ``[n, r]``; zeros where the term is absent."""
    if _can_group(term, x):
        assert term.V is not None
        return _grouped(x, term.V, rows)
    z = x.new_zeros(x.shape[0], term.rank)
    for s in rows.segments:
        if term.has(s.expert):
            z[s.start : s.stop] = term.inner(x[s.start : s.stop], s.expert)
    return z


def add_outer_by_rows(out: Tensor, term: LowRank, z: Tensor, rows: Rows) -> None:
    """Adds each row's ``U_e z``, ``[n, r]``, to ``out [n, out]``."""
    if _can_group(term, z):
        assert term.U is not None
        out.add_(_grouped(z, term.U, rows))
        return
    for s in rows.segments:
        slot = term.u_slots[s.expert]
        if slot is None:
            continue
        own = out[s.start : s.stop]
        if term.U is not None and term.rows is None:
            own.addmm_(z[s.start : s.stop], term.U[slot].t())
        else:
            own.add_(term.outer(z[s.start : s.stop], s.expert))


def add_by_rows(
    out: Tensor, term: Term, x: Tensor, rows: Rows, weights: Tensor | None = None
) -> None:
    """Adds what a term of any kind gives for each row to ``out [n, out]``.

    Args:
        out: Changed in place.
        term: The term.
        x: Inputs, ``[n, in]``.
        rows: Whose rows they are.
        weights: Factors of the rows, ``[n, 1]``; None for 1.
    """
    if isinstance(term, LowRank):
        z = inner_by_rows(term, x, rows)
        # The factors go on the smaller matrix.
        add_outer_by_rows(out, term, z if weights is None else (z * weights).to(z.dtype), rows)
        return
    for s in rows.segments:
        if term.has(s.expert):
            part = term.apply(x[s.start : s.stop], s.expert)
            if weights is not None:
                part = part * weights[s.start : s.stop]
            out[s.start : s.stop] += part.to(out.dtype)


def _can_group(term: LowRank, x: Tensor) -> bool:
    """Whether both factors can be multiplied in one grouped product each."""
    if x.device.type not in GROUPED_ON or grouped_mm is None:
        return False
    if term.U is None or term.V is None or term.rows is not None or term.cols is not None:
        return False
    if isinstance(term.U, PackedTensor) or isinstance(term.V, PackedTensor):
        return False  # multiplied out expert by expert, and only for those that have rows
    every = tuple(range(term.shape.members))
    if term.u_slots != every or term.v_slots != every or term.stored_u != len(every):
        return False
    sizes = (term.rank, term.shape.out_features, term.shape.in_features)
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        size * x.itemsize % _ALIGNED == 0 for size in sizes
    )


def _grouped(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    """Each row times its expert's matrix: ``[n, in]``, ``[E, out, in]`` → ``[n, out]``."""
    assert grouped_mm is not None
    return grouped_mm(x, weight.transpose(1, 2), offs=rows.offsets())


grouped_mm: Callable[..., Tensor] | None = getattr(
    F, "grouped_mm", getattr(torch, "_grouped_mm", None)
)
