"""Which experts of a layer form a group: lists of members, each ascending, by first member."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mctk.linalg import agglomerate, cosines
from torch import Tensor


def shares(frequency: Tensor) -> Tensor:
    """Returns each expert's share of a layer's routed tokens, ``[E]`` float64; zeros without any.

    Args:
        frequency: How often each expert was chosen, ``[E]``.
    """
    frequency = frequency.double()
    return frequency / frequency.sum().clamp(min=1)


def dominant(frequency: Tensor, count: int) -> list[int]:
    """Returns the `count` experts that are chosen most often; of equals the first.

    M-SMoE (arXiv 2310.01334), Algorithm 1, line 4, within one layer.

    Args:
        frequency: ``[E]``.
        count: From 1 to E.
    """
    order = torch.argsort(frequency.double(), descending=True, stable=True)
    return order[:count].tolist()


def uncovered(frequency: Tensor) -> list[float]:
    """Returns the share of routed tokens that 1, 2, ..., E dominant experts leave to the others."""
    best = shares(frequency).sort(descending=True).values
    left = best.flip(0).cumsum(0).flip(0)
    return [*left[1:].tolist(), 0.0]


def around(leaders: Sequence[int], similarity: Tensor) -> list[list[int]]:
    """Returns groups in which every expert joins the leader that it resembles most.

    M-SMoE, Algorithm 1, line 9.

    Args:
        leaders: Experts that lead a group; of equally similar ones the first in this order wins.
        similarity: ``[E, E]``.
    """
    found: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    chosen = similarity[:, list(leaders)].argmax(1).tolist()
    for e, place in enumerate(chosen):
        if e not in found:
            found[leaders[place]].append(e)
    return _ordered(list(found.values()))


def by_distance(points: Tensor, count: int, linkage: str, metric: str) -> list[list[int]]:
    """Returns agglomerative clusters of points.

    HC-SMoE (arXiv 2410.08589), "Hierarchical Clustering of Experts": Euclidean, average linkage.

    Args:
        points: ``[E, H]``.
        count: From 1 to E.
        linkage: See `mctk.linalg.agglomerate`.
        metric: "euclidean" or "cosine".
    """
    points = points.double()
    if metric == "cosine":
        distances = (1 - cosines(points @ points.T)).clamp(min=0)
    else:
        # Not by inner products: means of similar experts nearly cancel in those.
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(0.0)
    return agglomerate(distances, count, linkage)


def by_similarity(similarity: Tensor, count: int) -> list[list[int]]:
    """Returns clusters by average linkage of ``1 - similarity``, ``[E, E]``."""
    distances = (1 - similarity.double()).clamp(min=0)
    distances.fill_diagonal_(0.0)
    return agglomerate((distances + distances.T) / 2, count)


def at_random(experts: int, count: int, seed: int) -> list[list[int]]:
    """Returns groups of sizes that differ by one at most, drawn from a seed alone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(experts, generator=generator).tolist()
    return _ordered([order[i::count] for i in range(count)])


def _ordered(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return sorted(sorted(group) for group in groups)
