"""Low-rank factors before they are rounded: which carries the singular values (no paper's rule)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mctk.terms import LowRank
    from torch import Tensor


def even_columns(term: LowRank) -> LowRank:
    """Returns the same products with columns of U of equal norm; what they had goes into V's rows.

    A group of U's weights lies along the rank, so it mixes columns, and if those are as different
    as singular values, the small ones are rounded away. A group of V's lies within one row, which
    has its own scale. A U that meets several slots of V keeps its own norms, and pivoted factors
    have no choice; zero columns stay.

    Args:
        term: A low-rank term, on any device.
    """
    if term.U is None or term.V is None or term.U.is_meta:
        return term
    meets: dict[int, set[int]] = {}
    for u, v in zip(term.u_slots, term.v_slots, strict=True):
        if u is not None and v is not None:
            meets.setdefault(u, set()).add(v)
    if any(len(slots) > 1 for slots in meets.values()):
        return term
    left, right = term.U.clone(), term.V.clone()
    for v in sorted({v for slots in meets.values() for v in slots}):
        group = [u for u, slots in meets.items() if v in slots]
        norms = _column_norms(left[group])
        left[group] = left[group] / norms
        right[v] = right[v] * norms[:, None]
    return term.with_tensors({**term.tensors(), "U": left, "V": right})


def _column_norms(factors: Tensor) -> Tensor:
    """Root mean square over some factors ``[S, out, r]`` of each column's norm ``[r]``, 1 for 0."""
    norms = factors.square().sum(1).mean(0).sqrt()
    return torch.where(norms > 0, norms, torch.ones_like(norms))
