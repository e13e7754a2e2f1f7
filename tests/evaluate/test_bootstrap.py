"""The bootstrap that all intervals come from: what is kept between calls changes no figure."""

from __future__ import annotations

import numpy as np
import pytest
from mctk.evaluate import bootstrap
from mctk.evaluate.bootstrap import bootstrap_mean


@pytest.fixture
def groups():
    rng = np.random.default_rng(3)
    return [(rng.normal(size=n), tokens) for n, tokens in ((9, 1.0), (12, rng.uniform(1, 5, 12)))]


def test_draws_that_are_not_kept_give_the_same(groups, monkeypatch):
    kept = bootstrap_mean(groups, samples=500)
    monkeypatch.setattr(bootstrap, "BLOCK", 100)  # blocks of 11 and of 8 resamples
    assert bootstrap_mean(groups, samples=500) == pytest.approx(kept, rel=1e-12)


def test_it_is_the_percentiles_of_resampled_means(groups):
    """Drawn one by one, as the formula says."""
    value, low, high = bootstrap_mean(groups, samples=400, seed=5)
    generator = np.random.default_rng(5)
    means = np.zeros(400)
    for sums, tokens in groups:
        weights = np.broadcast_to(tokens, sums.shape)
        for i, drawn in enumerate(generator.integers(0, sums.size, size=(400, sums.size))):
            means[i] += sums[drawn].sum() / weights[drawn].sum() / 2
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)
    assert value == pytest.approx(
        sum(sums.sum() / np.broadcast_to(tokens, sums.shape).sum() for sums, tokens in groups) / 2
    )
