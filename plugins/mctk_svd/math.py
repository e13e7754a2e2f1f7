"""The mathematics of SVD with weighted rows or columns: one matrix in, its decomposition out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor

LEAST_ROW = 1e-6  # of the largest row weight: a row without gradients keeps a trace of itself
LEAST_COLUMN = 1e-6  # added to every column weight; the reference code of ASVD does the same


class ScaledSVD:
    """The SVD of ``D_r W D_c``, D diagonal, brought back: ``U ← D_r⁻¹ U``, ``V ← V D_c⁻¹``.

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


def row_weights(fisher: Tensor) -> Tensor:
    """Weights of a matrix's rows, the square roots of their Fisher information (FWSVD).

    Args:
        fisher: Squared gradients summed over each row, ``[out]``.

    Returns:
        ``[out]``, none below 1e-6 of the largest; ones where no gradient came at all.
    """
    weights = fisher.double().clamp(min=0).sqrt()
    largest = weights.max()
    if not bool(largest > 0):
        return torch.ones_like(weights)
    return weights.clamp(min=LEAST_ROW * float(largest))


def column_weights(mean: Tensor, alpha: float) -> Tensor:
    """Weights of a matrix's columns: ``(mean |x_j|)^α + 1e-6`` (ASVD).

    Args:
        mean: Mean magnitude of each input channel, ``[in]``.
        alpha: 0 weighs all alike.
    """
    return mean.double().clamp(min=0) ** alpha + LEAST_COLUMN


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
