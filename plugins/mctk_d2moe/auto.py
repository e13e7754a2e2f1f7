"""How many bases a layer gets: the number with the least expected error at its size."""

from __future__ import annotations

from collections.abc import Sequence

from mctk.linalg import metric_svd
from torch import Tensor


def candidates(experts: int) -> list[int]:
    """Returns the numbers of bases to try: powers of two, at least two experts to a base.

    >>> candidates(16)
    [1, 2, 4, 8]
    """
    return [1 << k for k in range(experts.bit_length()) if 2 << k <= experts] or [1]


def rank_within(experts: int, out: int, into: int, parameters: int, storage: str) -> int:
    """Returns the largest rank at which factors for all experts store no more than `parameters`.

    Args:
        experts: Matrices of the bank.
        out: Their rows.
        into: Their columns.
        parameters: For the bank.
        storage: "plain", ``r (out + in)`` for each expert, or "pivoted", ``r²`` less.
    """

    def cost(rank: int) -> int:
        return experts * (rank * (out + into) - (rank * rank if storage == "pivoted" else 0))

    low, high = 0, min(out, into)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= parameters else (low, middle - 1)
    return low


def residual_error(
    weight: Tensor, bases: Tensor, slots: Sequence[int], moment: Tensor, rank: int
) -> float:
    """The squared output error of the residuals cut at a rank, summed over tokens and experts.

    ``Σ_e Σ_{i>r} σ_i²`` with σ of ``W_e − W_b`` in the metric of the expert's own inputs. An
    expert without tokens adds nothing.

    Args:
        weight: ``[E, out, in]``.
        bases: ``[n, out, in]``.
        slots: The base of each expert.
        moment: ``[E, in, in]``, sums over each expert's tokens.
        rank: What the residuals keep.
    """
    total = 0.0
    for e, slot in enumerate(slots):
        if bool(moment[e].any()):
            residual = weight[e].float() - bases[slot]
            part = metric_svd(residual, input_moment=moment[e].to(residual.device))
            total += float(part.spectrum[rank:].sum())
    return total
