"""Directions are found once for equal inputs, with the same bits, and within a limit."""

from __future__ import annotations

import pytest
import torch
from mctk.linalg import metric_svd, remembered

SIZES = [(12, 20), (20, 12)]


def inputs(rows: int, columns: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """What a matrix may be decomposed by: nothing, what enters it, what it puts out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(columns, 64, generator=generator)
    return {
        "plain": {"weight": weight},
        "input": {"weight": weight, "input_moment": x @ x.T},
        "output": {"weight": weight, "output_moment": (weight @ x) @ (weight @ x).T},
    }


@pytest.fixture
def counted(monkeypatch):
    """How many eigenproblems of `metric_svd` were solved."""
    solved = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a, **k: (solved.append(1), eigh(*a, **k))[1])
    return solved


def copied(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in given.items()}


def factors(given: dict[str, torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
    part = metric_svd(**copied(given))
    return part.spectrum, *part.factors(rank)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["plain", "input", "output"])
def test_equal_matrices_are_decomposed_once_with_the_same_bits(counted, size, kind):
    given = inputs(*size)[kind]
    fresh = [factors(given, rank) for rank in (3, 5, 9)]
    assert len(counted) == 3
    with remembered(1 << 20):
        again = [factors(given, rank) for rank in (3, 5, 9)]
    assert len(counted) == 4
    for one, other in zip(fresh, again, strict=True):
        assert all(map(torch.equal, one, other))
    factors(given, 3)  # outside nothing is remembered
    assert len(counted) == 5


@pytest.mark.parametrize("size", SIZES)
def test_other_matrices_and_other_metrics_are_not_taken_for_it(counted, size):
    first, second = inputs(*size), inputs(*size, seed=1)
    expected = [factors(given, 4) for part in (first, second) for given in part.values()]
    # The same sums: entries that have changed places.
    turned = {"weight": first["plain"]["weight"].flip(0)}
    expected.append(factors(turned, 4))
    counted.clear()
    with remembered(1 << 20):
        found = [factors(given, 4) for part in (first, second) for given in part.values()]
        found.append(factors(turned, 4))
    assert len(counted) == 7
    for one, other in zip(expected, found, strict=True):
        assert all(map(torch.equal, one, other))


def test_no_more_is_held_than_allowed(counted):
    several = [inputs(12, 20, seed)["input"] for seed in range(5)]
    with remembered(1 << 20) as known:
        factors(several[0], 3)
    each = known.held
    assert each >= 4 * (12 * 20 + 20 * 20) + 8 * 12 * 13  # the matrix, its moment, what was found
    counted.clear()
    with remembered(2 * each) as known:
        for given in [several[0], several[1], several[0], several[2], several[0], several[1]]:
            factors(given, 3)
            assert known.held <= 2 * each
    assert len(counted) == 4  # the second was the one not used for longest when the third came
    counted.clear()
    with remembered(each - 1) as known:
        factors(several[0], 3)
        factors(several[0], 3)
    assert (known.held, len(counted)) == (0, 2)
