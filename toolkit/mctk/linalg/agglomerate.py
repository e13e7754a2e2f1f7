"""How alike a few things are, and agglomerative clusters of them."""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(gram: Tensor) -> Tensor:
    """Returns the cosines of things of which the inner products are known; of zeros all are 0.

    Args:
        gram: ``[..., E, E]``.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    length = torch.where(length > 0, length, torch.full_like(length, torch.inf))
    return gram / length[..., None, :] / length[..., None]


def agglomerate(distances: Tensor, count: int, linkage: str = "average") -> list[list[int]]:
    """Returns exactly `count` clusters, each ascending, ordered by first member.

    Args:
        distances: ``[E, E]``, symmetric, zero on the diagonal; "ward" takes them as Euclidean.
        count: From 1 to E.
        linkage: How far apart two clusters are: "average", "complete", "single" or "ward" (see
            `scipy.cluster.hierarchy.linkage`).
    """
    members = distances.shape[0]
    if count == 1:
        return [list(range(members))]
    if count == members:
        return [[e] for e in range(members)]
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    condensed = squareform(distances.double().cpu().numpy(), checks=False)
    tree = hierarchy.linkage(condensed, method=linkage)
    groups: dict[int, list[int]] = {}
    for e, label in enumerate(hierarchy.cut_tree(tree, n_clusters=count)[:, 0].tolist()):
        groups.setdefault(label, []).append(e)
    return list(groups.values())
