"""The mathematics of SVD-LLM: which moment to take, and the SVD in its metric.

The error of an approximation on the calibration tokens, ``‖(W - W_r) X‖²``, is a Frobenius norm in
the metric of ``C = X Xᵀ``. With ``C = S Sᵀ`` its minimum over rank r is the truncated SVD of
``W S``, mapped back by ``S⁻¹``; equally it is ``U Uᵀ W`` with U the leading eigenvectors of
``A = W C Wᵀ``, the moment of the outputs (`mctk.linalg.metric_svd` does both).
"""

from __future__ import annotations

from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor


def decomposition(weight: Tensor, moment: Tensor, side: str) -> MetricSVD:
    """Decomposes one matrix in the metric of a moment; cut at r it loses ``Σ_{i>r} σ_i²``.

    Args:
        weight: ``[out, in]``.
        moment: ``C [in, in]`` on the input side, ``A [out, out]`` on the output side. All zeros
            (no token was seen) give plain SVD.
        side: "input" or "output".
    """
    if side == "input":
        return metric_svd(weight, input_moment=moment)
    return metric_svd(weight, output_moment=moment)


def pooled_inputs(moment: Tensor, count: int, least: int, pooled: Tensor) -> Tensor:
    """Adds what a member lacks of `least` tokens as average tokens of all members.

    Args:
        moment: ``Σ x xᵀ [n, n]`` over the member's own tokens.
        count: How many those were.
        least: How many they should be.
        pooled: Mean ``x xᵀ [n, n]`` over the tokens of all members.

    Returns:
        The moment of ``max(count, least)`` tokens.
    """
    missing = max(least - count, 0)
    return moment + missing * pooled if missing else moment


def pooled_outputs(moment: Tensor, count: int, least: int, weight: Tensor, energy: float) -> Tensor:
    """The same on the output side: what is missing are white inputs through the member itself.

    What other members put out lies in other directions and says nothing about this one. A member
    without tokens is left with plain SVD.

    Args:
        moment: ``Σ (W x)(W x)ᵀ [n, n]`` over the member's own tokens.
        count: How many those were.
        least: How many they should be.
        weight: ``W [n, in]``.
        energy: Mean ``‖W x‖²`` over the tokens of all members: that of each token added.
    """
    missing = max(least - count, 0)
    if not missing:
        return moment
    white = weight.double() @ weight.double().T
    trace = float(white.trace())
    return moment + (missing * energy / trace * white if trace > 0 else 0.0)


def seen(count: int, least: int) -> float:
    """Returns the fraction of a member's moment that real tokens gave: it weighs its errors."""
    return count / max(count, least, 1)
