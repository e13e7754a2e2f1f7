"""Percentile bootstrap of means over windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SAMPLES = 10000


def bootstrap_mean(
    groups: Sequence[tuple[ArrayLike, ArrayLike]], samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over groups of each group's mean a token, with its 95 % interval.

    Windows are drawn with replacement, each group's by themselves, so that every text keeps its
    weight.

    Args:
        groups: For each text the windows' sums, [N], and the tokens that they are over: one
            number, or [N].
        samples: Number of resamples.
        seed: Seed of the draw.

    Returns:
        The mean and the bounds of its percentile interval.

    Raises:
        ValueError: There is no group, or an empty one.
    """
    generator = np.random.default_rng(seed)
    value, means = 0.0, np.zeros(samples)
    if not groups:
        raise ValueError("bootstrap: there is nothing to draw from")
    for given, tokens in groups:
        sums = np.asarray(given, dtype=np.float64)
        if sums.ndim != 1 or not sums.size:
            raise ValueError(f"bootstrap: sums of shape {sums.shape} are no list of windows")
        weights = np.broadcast_to(np.asarray(tokens, dtype=np.float64), sums.shape)
        value += float(sums.sum() / weights.sum()) / len(groups)
        step = max(1, (1 << 22) // sums.size)  # resamples drawn together: 32 MiB of indices
        for first in range(0, samples, step):
            count = min(step, samples - first)
            drawn = generator.integers(0, sums.size, size=(count, sums.size))
            means[first : first + count] += sums[drawn].sum(1) / weights[drawn].sum(1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return value, float(low), float(high)
