"""Matrix products of which half is known: symmetric results and triangular factors.

Done in panels of rows, so that a little more than half of the multiplications remain; torch has
no such routines of its own. Rows, because tensors are stored by rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Narrower panels would save little more and make poor use of the hardware.
_SMALLEST_PANEL = 64
_PANELS = 8


def upper_product(left: Tensor, right: Tensor) -> Tensor:
    """Returns the upper triangle of ``left rightᵀ``, which is symmetric; below it is zero.

    Args:
        left: ``[n, k]``.
        right: ``[n, k]``.
    """
    result = left.new_zeros(left.shape[0], right.shape[0])
    for start, stop in _panels(left.shape[0]):
        torch.mm(left[start:stop], right[start:].t(), out=result[start:stop, start:])
    return result.triu_()


def transposed_lower_product(lower: Tensor, matrix: Tensor) -> Tensor:
    """Returns ``lowerᵀ matrix`` for a lower triangular ``lower [n, n]`` and ``matrix [n, m]``."""
    result = torch.empty_like(matrix)
    for start, stop in _panels(lower.shape[0]):
        torch.mm(lower[start:, start:stop].t(), matrix[start:], out=result[start:stop])
    return result


def _panels(size: int) -> Iterator[tuple[int, int]]:
    width = max(_SMALLEST_PANEL, -(-size // _PANELS))
    for start in range(0, size, width):
        yield start, min(start + width, size)
