"""The mathematics of plain SVD: one matrix in, its decomposition out."""

from __future__ import annotations

from collections.abc import Iterator

from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor


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
