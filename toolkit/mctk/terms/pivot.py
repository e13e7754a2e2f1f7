"""Which rows of a tall factor become the identity."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are exchanged until no coefficient is larger: small coefficients lose nothing when they
# are rounded to a storage dtype.
_BOUND = 2.0


def pivot_rows(factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits ``factor = P [I; C] T`` exactly, with ``P`` placing rows.

    The rows come from a partially pivoted LU of the factor's orthonormal basis and are then
    exchanged while a coefficient exceeds 2 in size (as in the maxvol algorithm). Any factor has
    such a split, also one without full rank: the basis always has it.

    Args:
        factor: ``[n, r]`` in float64, ``r <= n``.

    Returns:
        ``pivots [r]``, int64 and ascending; ``C [n - r, r]``, the other rows in ascending order;
        ``T [r, r]``, the factor's own rows at the pivots.

    Raises:
        ValueError: The rank exceeds the number of rows.
    """
    n, rank = factor.shape
    if rank > n:
        raise ValueError(f"rank {rank} is larger than the {n} rows that would be pivoted")
    if rank == 0:
        empty = torch.zeros(0, dtype=torch.long, device=factor.device)
        return empty, factor, factor[:0]
    basis = torch.linalg.qr(factor).Q
    packed, swaps = torch.linalg.lu_factor(basis)
    order = list(range(n))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    lower = packed.tril(-1)
    rest = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    chosen = torch.tensor(_exchange(rest, order, rank), device=factor.device)
    chosen = chosen.sort().values
    others = torch.ones(n, dtype=torch.bool, device=factor.device)
    others[chosen] = False
    # Once more from the basis: the exchanges have piled up rounding errors.
    rest = torch.linalg.solve(basis[chosen], basis[others], left=False)
    return chosen, rest, factor[chosen]


def _exchange(rest: Tensor, order: list[int], rank: int) -> list[int]:
    """Exchanges rows while a coefficient in ``rest [n - r, r]`` exceeds the bound.

    Args:
        rest: Coefficients of the rows ``order[rank:]`` in the rows ``order[:rank]``; overwritten.
        order: The rows, overwritten.
        rank: How many rows are pivots.

    Returns:
        The pivots.
    """
    # Each exchange multiplies the pivots' volume by more than the bound, so this ends by itself;
    # the limit only guards against rounding errors that go in circles.
    for _ in range(4 * rank if rest.numel() else 0):
        flat = int(rest.abs().argmax())
        i, j = divmod(flat, rank)
        pivot = float(rest[i, j])
        if abs(pivot) <= _BOUND:
            break
        order[rank + i], order[j] = order[j], order[rank + i]
        step = rest[i] / pivot
        step[j] = (pivot - 1) / pivot
        column = rest[:, j].clone()
        rest.addr_(column, step, alpha=-1)
        # The row that left the pivots takes the place of the row that entered.
        rest[i] = -step
        rest[i, j] = 1 / pivot
    return order[:rank]
