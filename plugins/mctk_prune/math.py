"""Scores of experts, and the choice of the best."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mctk.statistics import OutputSums

    from mctk_prune.methods import Average


def random_scores(experts: int, layer: int, seed: int) -> Tensor:
    """Uniform numbers, float64 [E], the same for the same layer and seed."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    return torch.rand(experts, generator=generator, dtype=torch.float64)


def output_norms(sums: OutputSums, score: Average) -> Tensor:
    """Norms of what experts give, float64 [E] (EAN: expert activation norm).

    The sum is eq. 13 of REAP's appendix D (arXiv 2510.13999).

    Args:
        sums: Of a layer.
        score: Over the tokens routed to an expert: their sum, mean or maximum, or the sum weighted
            by routing weights. 0 of an expert without tokens.
    """
    if score == "mean":
        return sums.norm / sums.count.clamp(min=1)
    return {"sum": sums.norm, "max": sums.largest, "weighted_sum": sums.weighted_norm}[score]


def weighted_norms(sums: OutputSums) -> Tensor:
    """Mean over an expert's tokens of g ‖y‖, float64 [E] (REAP, arXiv 2510.13999, eq. 9).

    g is the routing weight with which the model adds the output y up. 0 of an expert without
    tokens.
    """
    return sums.weighted_norm / sums.count.clamp(min=1)


def mean_outputs(sums: OutputSums) -> Tensor:
    """Mean output of each expert over its tokens, before routing weights, float64 [E, H].

    MoNE's "novices" (arXiv 2507.00390): of all constants they leave the least squared error. Zero
    of an expert without tokens.
    """
    return sums.total / sums.count.clamp(min=1)[:, None]


def variations(sums: OutputSums) -> Tensor:
    """How far an expert's outputs are from their mean, float64 [E].

    The norm over channels of the standard deviation over tokens, that with n - 1: MoNE's output
    variance (arXiv 2507.00390), exact where the reference has a running estimate. 0 of an expert
    with fewer than two tokens.
    """
    square = sums.square - sums.total.square() / sums.count.clamp(min=1)[:, None]
    variance = square.clamp(min=0) / (sums.count - 1).clamp(min=1)[:, None]
    return variance.sum(1).sqrt()


def best(scores: Tensor, keep: int, groups: int, candidates: Collection[int]) -> list[int]:
    """The experts that stay, ascending: those of the highest scores, of equal ones the first.

    Args:
        scores: [E].
        keep: How many stay, a multiple of groups.
        groups: As many stay in each of so many equal runs of experts.
        candidates: The experts among which to choose.
    """
    size = scores.numel() // groups
    kept: list[int] = []
    for start in range(0, scores.numel(), size):
        run = [expert for expert in range(start, start + size) if expert in candidates]
        # Sorting is stable: the first of equals is taken.
        kept += sorted(run, key=lambda expert: -float(scores[expert]))[: keep // groups]
    return sorted(kept)
