"""The mathematics of pruning single entries: which stay, and what goes with the others.

Rows are Wanda's comparison groups (arXiv 2306.11695, section 3), n:m its structured patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Sizes that a bank may take, at most: a grid of 1/256 of a row.
_SIZES = 256


def sizes(columns: int, pattern: tuple[int, int] | None) -> list[int]:
    """Returns how many entries of each row of a matrix may stay, ascending, all of them left out.

    Args:
        columns: Entries of a row.
        pattern: (n, m) for n of m neighbours: then there is one size.
    """
    if pattern is not None:
        return [columns // pattern[1] * pattern[0]]
    step = -(-columns // _SIZES)
    return list(range(step, columns, step))


def keep(scores: Tensor, entries: int, pattern: tuple[int, int] | None, by_row: bool) -> Tensor:
    """Returns which entries of a matrix stay, ``[out, in]`` bool; of equal scores the first.

    Args:
        scores: Not negative, ``[out, in]``.
        entries: How many stay in each row, or on average.
        pattern: (n, m): the best n of each m neighbours in a row.
        by_row: Whether entries compete within their row, and not in the whole matrix.
    """
    rows, columns = scores.shape
    if pattern is not None:
        n, m = pattern
        parts = scores.reshape(rows, columns // m, m)
        return _best(parts, n).reshape(rows, columns)
    if by_row:
        return _best(scores, entries)
    return _best(scores.reshape(1, -1), rows * entries).reshape(rows, columns)


def dropped(
    scores: Tensor, settings: Sequence[int], pattern: tuple[int, int] | None, by_row: bool
) -> Iterator[float]:
    """Yields for each setting the sum of the squared scores of the entries that go.

    Args:
        scores: ``[out, in]``.
        settings: Entries that stay in each row, or on average.
        pattern: See `keep`.
        by_row: See `keep`.
    """
    energy = scores.double().square()
    rows, columns = scores.shape
    if pattern is not None:
        mask = keep(scores, settings[0], pattern, by_row)
        yield from (float(energy.masked_fill(mask, 0).sum()) for _ in settings)
        return
    ordered = (energy if by_row else energy.reshape(1, -1)).sort(dim=1).values
    # Summed from the smallest on, so that small sums keep their digits.
    tails = ordered.cumsum(1).sum(0)
    for entries in settings:
        gone = (columns - entries) * (1 if by_row else rows)
        yield float(tails[gone - 1]) if gone else 0.0


def _best(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of the last dimension."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter(-1, order, True)
