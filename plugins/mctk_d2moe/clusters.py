"""Which experts share a base: agglomerative clusters of a layer's experts."""

from __future__ import annotations

import torch
from mctk.linalg import agglomerate
from torch import Tensor

# Elements of one block of rows in float64, so that no copy of a whole bank is made.
_BLOCK = 1 << 24


def differences(weight: Tensor, metric: Tensor | None = None) -> Tensor:
    """Squared distances between experts, relative to their mean energy.

    ``d_ef = tr (W_e − W_f) C (W_e − W_f)ᵀ / mean_e tr W_e C W_eᵀ``. With C the second moment of
    the layer's inputs that is the expected squared difference of two experts' outputs, on tokens
    of either; without C it is the squared Frobenius distance.

    Args:
        weight: ``[E, out, in]``.
        metric: ``C [in, in]``.

    Returns:
        ``[E, E]`` float64, symmetric, zero on the diagonal.
    """
    experts, rows, columns = weight.shape
    gram = torch.zeros(experts, experts, dtype=torch.float64, device=weight.device)
    step = max(1, _BLOCK // (experts * columns))
    for start in range(0, rows, step):
        block = weight[:, start : start + step].double()
        other = block if metric is None else block @ metric.to(block)
        gram += block.flatten(1) @ other.flatten(1).T
    gram = (gram + gram.T) / 2
    energy = gram.diagonal()
    distance = (energy + energy[:, None] - 2 * gram).clamp(min=0)
    distance.fill_diagonal_(0.0)
    mean = float(energy.mean())
    return distance / mean if mean > 0 else distance


def clusters(distances: Tensor, count: int) -> list[list[int]]:
    """Returns exactly `count` clusters by average linkage, each ascending, ordered by first member.

    Args:
        distances: Squared distances ``[E, E]``.
        count: From 1 to E.
    """
    return agglomerate(distances.sqrt(), count)
