"""What stays of an expert's residual: its largest entries, or a low rank of all its matrices.

An expert's residual is one design matrix ``R = [R_gate | R_up | R_downᵀ]``, ``[I, 3H]``
(arXiv 2503.06881). Functions take its parts: gate and up ``[I, H]``, down ``[H, I]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mctk.linalg import MetricSVD, metric_svd
from torch import Tensor


def largest(parts: Mapping[str, Tensor], count: int, multiple: int = 1) -> dict[str, Tensor]:
    """Which entries are the largest in magnitude, by one threshold over all parts together (UP).

    Exactly `count` stay; of equal entries the first, in the order of the parts and of their rows.
    With a multiple, each part's number is then rounded to one (up where most is missing, so that
    `count` stay in all), and the part keeps its own largest.

    Args:
        parts: Matrices of any shapes.
        count: How many entries stay, from 1 to all; a multiple of `multiple`.
        multiple: What each part's number is a multiple of.

    Returns:
        Part → a mask of its shape, true where an entry stays.
    """
    flat = [matrix.abs().flatten() for matrix in parts.values()]
    kept = _largest(torch.cat(flat), count).split([size.numel() for size in flat])
    if multiple > 1:
        counts = _rounded([int(mask.sum()) for mask in kept], flat, multiple)
        kept = tuple(_largest(size, n) for size, n in zip(flat, counts, strict=True))
    return {part: mask.view(parts[part].shape) for part, mask in zip(parts, kept, strict=True)}


def _largest(size: Tensor, count: int) -> Tensor:
    """A mask of the `count` largest of non-negative numbers ``[n]``, of equal ones the first."""
    if not count:
        return torch.zeros_like(size, dtype=torch.bool)
    threshold = size.kthvalue(size.numel() - count + 1).values
    kept = size > threshold
    equal = (size == threshold).nonzero()[: count - int(kept.sum()), 0]
    kept[equal] = True
    return kept


def _rounded(counts: list[int], sizes: list[Tensor], multiple: int) -> list[int]:
    """Returns multiples with the same sum, each less than one multiple from its count."""
    found = [n - n % multiple for n in counts]
    missing = (sum(counts) - sum(found)) // multiple
    room = [i for i, n in enumerate(found) if n + multiple <= sizes[i].numel()]
    for i in sorted(room, key=lambda i: (found[i] - counts[i], i))[:missing]:
        found[i] += multiple
    return found


def joint(parts: Mapping[str, Tensor]) -> MetricSVD:
    """The decomposition of the design matrix: one U on the side of the neurons for all parts."""
    return metric_svd(design(parts))


def design(parts: Mapping[str, Tensor]) -> Tensor:
    """The design matrix ``[I, 3H]``, parts side by side in their order."""
    return torch.cat(
        [matrix.T if part == "down" else matrix for part, matrix in parts.items()], dim=1
    )


def factors_by_part(
    left: Tensor, right: Tensor, parts: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits the factors of a design matrix into those of its parts.

    Args:
        left: U ``[I, r]``.
        right: V ``[r, 3H]``.
        parts: The matrices that the design matrix was made of.

    Returns:
        Part → U and V of its own matrix: ``[I, r]``, ``[r, H]``; of down ``[H, r]``, ``[r, I]``.
    """
    found = {}
    start = 0
    for part, matrix in parts.items():
        width = matrix.shape[0] if part == "down" else matrix.shape[1]
        block = right[:, start : start + width]
        found[part] = (block.T, left.T) if part == "down" else (left, block)
        start += width
    return found
