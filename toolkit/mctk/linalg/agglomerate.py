"""Agglomerative clusters of a few things of which distances are known."""

from __future__ import annotations

from torch import Tensor


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
