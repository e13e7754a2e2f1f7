"""Low-rank factors that several experts share: one decomposition of their stacked residuals."""

from __future__ import annotations

from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor


def stacked(weight: Tensor, moment: Tensor) -> MetricSVD:
    """Decomposes matrices on top of each other: ``[W_1; W_2; ...] ≈ [U_1; U_2; ...] V``.

    The V ``[r, in]`` shared by all that loses least: ``Σ_e tr (W_e − U_e V) C (W_e − U_e V)ᵀ`` is
    the sum of the dropped σ² of the stack.

    Args:
        weight: ``[S, out, in]``.
        moment: ``C [in, in]``, of the inputs of all experts together.
    """
    return metric_svd(weight.flatten(0, 1), input_moment=moment)


def split(left: Tensor, matrices: int) -> Tensor:
    """Returns the ``U_e [S, out, r]`` of a stack's left factor ``[S · out, r]``."""
    return left.unflatten(0, (matrices, -1)).contiguous()


def averaged_spectrum(part: MetricSVD, matrices: int) -> Tensor:
    """What each direction adds where the mean of the ``U_e`` serves all experts.

    Whitened, the rows of V are orthogonal, so directions add up: with ``ū_i`` the mean over e of
    ``u_ei`` and ``u_i`` the stack, ``Σ_e ‖(W_e − Ū V) S‖² = Σ_i σ_i² − Σ_{i≤r} σ_i² S ‖ū_i‖² /
    ‖u_i‖²``.

    Args:
        part: The decomposition of the stack.
        matrices: S, how many are stacked.

    Returns:
        ``[n]`` float64, not sorted; n = the stack's full rank.
    """
    left, _ = part.factors(part.spectrum.numel())
    left = left.double()
    whole = left.square().sum(0)
    mean = split(left, matrices).mean(0).square().sum(0)
    ratio = matrices * mean / whole.where(whole > 0, whole.new_ones(()))
    return part.spectrum * ratio
