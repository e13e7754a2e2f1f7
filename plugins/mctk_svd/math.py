"""The mathematics of SVD with weighted channels: one matrix in, its decomposition out.

Sections and equations are those of FWSVD, arXiv 2207.00112, and of ASVD, arXiv 2312.05821v4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor

LEAST_FISHER = 1e-6  # of the largest weight: a channel without gradients keeps a trace of itself
LEAST_MAGNITUDE = 1e-6  # added to every weight; the authors' code of ASVD does the same


class ScaledSVD:
    """The SVD of ``D_r W D_c``, D diagonal, brought back: ``U ← D_r⁻¹ U``, ``V ← V D_c⁻¹``.

    With D_c that is ASVD's eq. 3 to 6 and, its matrices transposed, the solution of FWSVD's eq. 6.

    Args:
        weight: ``W [out, in]``.
        rows: The diagonal of D_r ``[out]``, positive; ones if not given.
        columns: The diagonal of D_c ``[in]``, positive; ones if not given.
    """

    def __init__(
        self, weight: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        self._dtype = weight.dtype
        self._rows = None if rows is None else rows.to(weight.device).double()
        self._columns = None if columns is None else columns.to(weight.device).double()
        scaled = weight.double()
        if self._rows is not None:
            scaled = self._rows[:, None] * scaled
        if self._columns is not None:
            scaled = scaled * self._columns
        self._part: MetricSVD = metric_svd(scaled)

    @property
    def spectrum(self) -> Tensor:
        """Squared singular values of the weighted matrix, descending: what dropping each costs."""
        return self._part.spectrum

    def factors(self, rank: int, balance: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ``U [out, r]`` and ``V [r, in]``; see `MetricSVD.factors`.

        Args:
            rank: From 0 to ``min(out, in)``.
            balance: Share the weighted matrix's singular values evenly.
        """
        left, right = self._part.factors(rank, balance=balance)
        if self._rows is not None:
            left = left / self._rows[:, None]
        if self._columns is not None:
            right = right / self._columns
        dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        return left.to(dtype), right.to(dtype)


def decompositions(weight: Tensor) -> Iterator[MetricSVD]:
    """Decomposes every matrix by itself; truncation to rank r is its best in Frobenius norm.

    That is the best output, too, for inputs whose features are uncorrelated and equally strong,
    which activations are not: see decompose/svd_llm.

    Args:
        weight: ``[S, out, in]``.

    Yields:
        For each slot a decomposition ``W = Σ_i σ_i u_i v_iᵀ``; cut at r, it loses ``Σ_{i>r} σ_i²``
        of ``‖W‖²`` (Eckart and Young).
    """
    for matrix in weight:
        yield metric_svd(matrix)


def fisher_weights(fisher: Tensor) -> Tensor:
    """Weights of a matrix's channels, the square roots of their Fisher information.

    FWSVD, section 4: the diagonal of Î. The floor is not in the paper, which divides by Î.

    Args:
        fisher: Squared gradients summed over the weights of each channel, ``[n]``.

    Returns:
        ``[n]``, none below 1e-6 of the largest; ones where no gradient came at all.
    """
    weights = fisher.double().clamp(min=0).sqrt()
    largest = weights.max()
    if not bool(largest > 0):
        return torch.ones_like(weights)
    return weights.clamp(min=LEAST_FISHER * float(largest))


def magnitude_weights(mean: Tensor, alpha: float) -> Tensor:
    """Weights of a matrix's inputs: ``(mean |x_j|)^α``, ASVD's eq. 8, and 1e-6 as in its code.

    Args:
        mean: Mean magnitude of each input channel, ``[in]``.
        alpha: 0 weighs all alike.
    """
    return mean.double().clamp(min=0) ** alpha + LEAST_MAGNITUDE


def pooled_mean(total: Tensor, count: int, least: int, mean: Tensor) -> Tensor:
    """Mean magnitudes of a member, what it lacks of `least` tokens added as average tokens.

    Args:
        total: ``Σ |x_j| [in]`` over the member's own tokens.
        count: How many those were.
        least: How many they should be.
        mean: Mean ``|x_j| [in]`` over the tokens of all members.
    """
    missing = max(least - count, 0)
    return (total + missing * mean) / max(count, least, 1)
