"""Which intermediate channels of a base matter, and how many stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scores(down: Tensor, energy: Tensor) -> Tensor:
    """Squared error of a layer's output if a base loses one channel (eq. 9, squared).

    ``‖W_b[:, j]‖² · Σ_t (Σ_e g_e h_ej)²``: what the base of down does to a token is linear in the
    routing-weighted sum of its experts' activations. A base that no token visits is judged by its
    columns alone.

    Args:
        down: The bases of down, ``[S, out, I]``.
        energy: Sum over tokens of the squared routing-weighted activations, ``[S, I]``.

    Returns:
        ``[S, I]`` float64.
    """
    columns = down.double().square().sum(1)
    energy = energy.to(columns)
    return columns * energy.where(energy.any(1, keepdim=True), torch.ones_like(energy))


def group_energy(
    own: Tensor, frequency: Tensor, routing: Tensor, groups: Sequence[Sequence[int]]
) -> Tensor:
    """The energies that bases of several clusters see, from those of their experts.

    ``Σ_{e in group} ḡ_e² Σ_t h_ej²`` with ``ḡ_e`` the mean routing weight of an expert: the exact
    sum would be taken per cluster while tokens flow, when clusters are not known yet. Left out
    are products between experts of one cluster on the same token.

    Args:
        own: ``Σ_t h_ej²`` over each expert's tokens, ``[E, I]``.
        frequency: Their number, ``[E]``.
        routing: Sums of routing weights, ``[E]``.
        groups: The clusters' members.

    Returns:
        ``[S, I]`` float64.
    """
    mean = routing.double() / frequency.double().clamp(min=1)
    weighed = own.double() * mean.square()[:, None]
    return torch.stack([weighed[list(group)].sum(0) for group in groups])


def keep(channel_scores: Tensor, count: int) -> Tensor:
    """Returns the channels with the highest scores, ascending; of equals the first stay.

    Args:
        channel_scores: ``[S, I]``.
        count: How many stay in every slot.

    Returns:
        ``[S, count]`` int64.
    """
    best = channel_scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return best.sort(dim=1).values


def remaining(channels: int, share: float, multiple: int) -> int:
    """Returns how many channels stay if a share goes: the nearest multiple, at least one of them.

    Where nothing or next to nothing goes, all stay, be they a multiple or not.

    >>> remaining(14336, 0.05, 8), remaining(100, 0.01, 8), remaining(64, 1.0, 8)
    (13616, 100, 8)
    """
    target = (1 - share) * channels
    # Half a multiple up: of two equally near the larger.
    nearest = int(target / multiple + 0.5) * multiple
    if channels - target < multiple / 2:
        return channels
    return min(channels, max(nearest, multiple))
