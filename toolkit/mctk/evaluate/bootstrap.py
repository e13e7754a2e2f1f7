"""Percentile bootstrap of means over windows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SAMPLES = 10000
BLOCK = 1 << 22  # counts that are held together: 32 MiB


def bootstrap_mean(
    groups: Sequence[tuple[ArrayLike, ArrayLike]], samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean over groups of each group's mean a token, with its 95 % interval.

    Windows are drawn with replacement, each group's by themselves, so that every text keeps its
    weight. What is drawn depends on the numbers of windows and the seed alone, and is kept between
    calls where it is small: a comparison asks for hundreds of intervals over the same windows.

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
    if not groups:
        raise ValueError("bootstrap: there is nothing to draw from")
    pairs = []
    for given, tokens in groups:
        sums = np.asarray(given, dtype=np.float64)
        if sums.ndim != 1 or not sums.size:
            raise ValueError(f"bootstrap: sums of shape {sums.shape} are no list of windows")
        pairs.append((sums, np.broadcast_to(np.asarray(tokens, dtype=np.float64), sums.shape)))
    sizes = tuple(sums.size for sums, _ in pairs)
    small = samples * sum(sizes) <= BLOCK
    blocks = iter(_kept(sizes, samples, seed) if small else _draws(sizes, samples, seed))
    value, means = 0.0, np.zeros(samples)
    for sums, weights in pairs:
        value += float(sums.sum() / weights.sum()) / len(groups)
        alike = bool((weights == weights[0]).all())  # then every resample has as many tokens
        done = 0
        while done < samples:
            counts = next(blocks)
            drawn = slice(done, done + len(counts))
            tokens = sums.size * weights[0] if alike else counts @ weights
            means[drawn] += (counts @ sums) / tokens / len(groups)
            done = drawn.stop
    low, high = np.quantile(means, [0.025, 0.975])
    return value, float(low), float(high)


def _draws(sizes: Sequence[int], samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample takes each window: blocks [≤ samples, N], one group after another."""
    generator = np.random.default_rng(seed)
    for size in sizes:
        step = max(1, BLOCK // size)
        for first in range(0, samples, step):
            count = min(step, samples - first)
            drawn = generator.integers(0, size, size=(count, size))
            drawn += size * np.arange(count)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=count * size)
            yield counts.reshape(count, size).astype(np.float64)


@functools.lru_cache(maxsize=4)
def _kept(sizes: tuple[int, ...], samples: int, seed: int) -> tuple[np.ndarray, ...]:
    return tuple(_draws(sizes, samples, seed))
