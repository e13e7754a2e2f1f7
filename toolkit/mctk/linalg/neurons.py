"""The order of an expert's intermediate neurons, which is arbitrary.

Gate rows, up rows and down columns permuted together leave an expert's function as it was, but
matrices in different orders have no meaningful mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def assign(cost: Tensor) -> Tensor:
    """Returns the assignment of least cost: ``order [I]`` that minimises ``Σ_i cost[i, order_i]``.

    Args:
        cost: What it costs to put neuron j at place i, ``[I, I]``.
    """
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).long()


def match(anchor: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Tensor:
    """Returns which neuron of an expert belongs to each neuron of another, the anchor.

    The assignment that maximises ``Σ_i M[i, order_i]`` with
    ``M = W1_b W1ᵀ + W3_b W3ᵀ + W2_bᵀ W2`` (gate, up, down; b the anchor).

    Args:
        anchor: Its gate ``[I, H]`` (if it has one), up ``[I, H]`` and down ``[H, I]``.
        other: The same of the expert.

    Returns:
        ``order [I]``: neuron ``order[i]`` of the expert comes to place i.
    """
    profit = anchor["up"].float() @ other["up"].float().T
    if "gate" in anchor:
        profit += anchor["gate"].float() @ other["gate"].float().T
    profit += anchor["down"].float().T @ other["down"].float()
    return assign(-profit)


def orders(
    weights: Mapping[str, Tensor], groups: Sequence[Sequence[int]], anchors: Sequence[int]
) -> Tensor:
    """Returns the order that brings every expert to the anchor of its cluster, ``[E, I]`` int64.

    Args:
        weights: Gate (if there is one), up ``[E, I, H]`` and down ``[E, H, I]``.
        groups: The clusters' members.
        anchors: For each cluster the expert that keeps its own order.
    """
    experts, neurons, _ = weights["up"].shape
    result = torch.arange(neurons).repeat(experts, 1)
    for group, anchor in zip(groups, anchors, strict=True):
        fixed = {part: stack[anchor] for part, stack in weights.items()}
        for e in group:
            if e != anchor:
                result[e] = match(fixed, {part: stack[e] for part, stack in weights.items()})
    return result


def reorder(stack: Tensor, part: str, order: Tensor | None) -> Tensor:
    """Returns what belongs to a bank's matrices, one or more per element, in another order.

    Args:
        stack: ``[E, out, in]``; of gate and up the rows move, of down the columns.
        part: "gate", "up" or "down".
        order: ``[E, I]``; None changes nothing.
    """
    if order is None:
        return stack
    index = order.to(stack.device)
    index = index[:, None, :] if part == "down" else index[:, :, None]
    return stack.gather(2 if part == "down" else 1, index.expand_as(stack))
