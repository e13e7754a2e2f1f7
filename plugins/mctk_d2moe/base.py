"""What a cluster of experts has in common: one matrix for several, by five rules.

Every function takes all experts' matrices of a bank, ``weight [E, out, in]``, and the members of
one cluster, and returns that cluster's base ``W_b [out, in]`` in float32. Sums run in float64: a
base of identical matrices is that matrix, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the mean diagonal; grows tenfold until the sum of moments can be factored.
FIRST_DAMPING = 1e-10

# Elements of one block of rows in float64, so that no copy of a whole bank is made.
_BLOCK = 1 << 24


def weighted(
    weight: Tensor,
    members: Sequence[int],
    scale: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """The weighted mean ``W_b = Σ_e a_e ⊙ W_e / Σ_e a_e`` with ``a_e = scale_e · importance_e``.

    Where all weights are zero (no expert saw a token, no gradient reached an element) it is the
    mean. With F the Fisher information and f the frequency: ``importance`` F alone is eq. 5 of
    arXiv 2502.17298, ``scale`` f as well is what the authors' code does, f alone is the merge by
    frequency, neither the mean.

    Args:
        weight: ``[E, out, in]``.
        members: The cluster.
        scale: A factor for each expert, ``[E]``, not negative.
        importance: A weight for each element, ``[E, out, in]``, not negative.
    """
    members = list(members)
    _, rows, columns = weight.shape
    result = torch.empty(rows, columns, device=weight.device)
    step = max(1, _BLOCK // (len(members) * columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        block = weight[members, part].double()
        share = torch.ones(len(members), 1, 1, dtype=torch.float64, device=block.device)
        if scale is not None:
            share = scale.to(block)[members, None, None]
        if importance is not None:
            share = share * importance[members, part].to(block)
        mass = share.sum(0)
        mean = (share * block).sum(0) / mass
        result[part] = torch.where(mass > 0, mean, block.mean(0))
    return result


def regmean(
    weight: Tensor, members: Sequence[int], moment: Tensor, off_diagonal: float = 1.0
) -> Tensor:
    """The matrix whose outputs are nearest to the experts' own on their tokens (RegMean).

    ``W_b`` minimises ``Σ_e ‖(W_e − W_b) X_e‖²``, so ``W_b Σ_e G_e = Σ_e W_e G_e`` with
    ``G_e = X_e X_eᵀ`` (arXiv 2212.09849, eq. 2). Solved for the distance from the mean, so that
    directions in which nothing was seen keep the mean.

    Args:
        weight: ``[E, out, in]``.
        members: The cluster.
        moment: ``G [E, in, in]``, sums over each expert's tokens.
        off_diagonal: What moments keep off their diagonal; 0 weighs every input by its energy.
    """
    mean = weighted(weight, members).double()
    left = torch.zeros_like(moment[0], dtype=torch.float64)
    right = torch.zeros_like(mean)
    for e in members:
        gram = moment[e].double()
        gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
        left += gram
        right += (weight[e].double() - mean) @ gram.to(mean.device)
    # With a unit diagonal, damping treats weak and strong inputs alike.
    size = left.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    left = left / size / size[:, None]
    factor = _cholesky(left).to(mean.device)
    size = size.to(mean.device)
    shift = torch.cholesky_solve((right / size).T, factor).T / size
    return (mean + shift).float()


def _cholesky(matrix: Tensor) -> Tensor:
    """Returns L ``[n, n]`` of a positive semidefinite matrix with as little damping as needed."""
    damping = FIRST_DAMPING
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return factor
        damping *= 10


def ties(weight: Tensor, members: Sequence[int], anchor: int, density: float) -> Tensor:
    """Trim, elect signs, merge (TIES, arXiv 2306.01708) around one of the experts.

    Of every difference ``W_e − W_anchor`` the largest entries stay; the sign with more mass wins
    each position; ``W_b = W_anchor`` + the mean of the entries that stayed and have that sign.

    Args:
        weight: ``[E, out, in]``.
        members: The cluster; the anchor is one of them.
        anchor: The expert whose place the original model has in TIES.
        density: The fraction of each difference that stays.
    """
    start = weight[anchor].double()
    sums = torch.zeros(2, *start.shape, dtype=torch.float64, device=start.device)
    counts = torch.zeros_like(sums)
    for e in members:
        if e == anchor:
            continue
        kept = trim(weight[e].double() - start, density)
        for side, part in enumerate((kept.clamp(min=0), kept.clamp(max=0))):
            sums[side] += part
            counts[side] += part != 0
    means = sums / counts.clamp(min=1)
    elected = sums.sum(0)
    merged = torch.where(elected > 0, means[0], torch.where(elected < 0, means[1], 0.0))
    return (start + merged).float()


def trim(difference: Tensor, density: float) -> Tensor:
    """Returns a matrix with its largest entries, a fraction `density` of all, and zero elsewhere.

    Entries as large as the smallest that stays, stay as well.
    """
    size = difference.abs().flatten()
    drop = size.numel() - max(1, round(density * size.numel()))
    if drop < 1:
        return difference
    return difference * (difference.abs() >= size.kthvalue(drop + 1).values)


def random_scale(experts: int, seed: int) -> Tensor:
    """Returns a weight for each expert, ``[E]`` float64, uniform in (0, 1], from a seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return 1 - torch.rand(experts, generator=generator, dtype=torch.float64)
