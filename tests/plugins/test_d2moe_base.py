"""The five rules for a base, each against what it should compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk_d2moe import base, clusters


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_of_elements_by_hand():
    weight = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    importance = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]])
    got = base.weighted(weight, [0, 1], importance=importance)
    assert torch.equal(got, torch.tensor([[2.5, 6.0]]))  # (1 + 9) / 4, 12 / 2
    got = base.weighted(weight, [0, 1], scale=torch.tensor([3, 1]), importance=importance)
    assert torch.equal(got, torch.tensor([[2.0, 6.0]]))  # (3 + 9) / 6


def test_equal_weights_are_the_mean_and_no_weights_too():
    weight = draw(4, 3, 5)
    mean = base.weighted(weight, [0, 1, 2, 3])
    assert torch.allclose(mean, weight.mean(0), atol=1e-6)
    same = base.weighted(weight, range(4), torch.full((4,), 7), torch.full((4, 3, 5), 0.3))
    assert torch.allclose(same, mean, atol=1e-7)
    none = base.weighted(weight, range(4), torch.zeros(4), torch.rand(4, 3, 5))
    assert torch.equal(none, mean)


def test_zero_weights_are_decided_element_by_element():
    weight, importance = draw(3, 2, 2), torch.zeros(3, 2, 2)
    importance[1, 0, 0] = 1e-30
    got = base.weighted(weight, range(3), importance=importance)
    assert got[0, 0] == weight[1, 0, 0]
    assert torch.equal(got[1], weight.double().mean(0).float()[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=2, max_size=5), st.integers(0, 1000))
def test_identical_matrices_are_their_own_base(counts, seed):
    experts = len(counts)
    weight = draw(1, 4, 6, seed=seed).expand(experts, 4, 6)
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(experts, 4, 6, generator=generator)
    scale = torch.tensor(counts)
    members = range(experts)
    assert torch.equal(base.weighted(weight, members, scale, importance), weight[0])
    assert torch.equal(base.ties(weight, members, 0, 0.2), weight[0])
    moment = torch.stack([x.T @ x for x in draw(experts, 9, 6, seed=seed + 1)])
    assert torch.allclose(base.regmean(weight, members, moment), weight[0], atol=1e-6)


def test_only_members_count():
    weight, moment = draw(4, 3, 5), torch.stack([x.T @ x for x in draw(4, 9, 5, seed=2)])
    other = weight.clone()
    other[2] += 100.0
    for rule in (
        lambda w: base.weighted(w, [0, 3], torch.arange(4)),
        lambda w: base.regmean(w, [0, 3], moment),
        lambda w: base.ties(w, [0, 3], 3, 0.5),
    ):
        assert torch.equal(rule(weight), rule(other))
    assert torch.equal(base.weighted(weight, [2]), weight[2])
    assert torch.equal(base.ties(weight, [2], 2, 0.5), weight[2])


def test_regmean_is_the_least_squares_solution():
    weight = draw(3, 4, 6)
    inputs = [draw(20 + 10 * e, 6, seed=e) * torch.logspace(0, -2, 6) for e in range(3)]
    moment = torch.stack([x.T @ x for x in inputs])
    got = base.regmean(weight, range(3), moment)
    x = torch.cat(inputs).double()
    y = torch.cat([x @ w.T for x, w in zip(inputs, weight, strict=True)]).double()
    expected = torch.linalg.lstsq(x, y).solution.T.float()
    assert torch.allclose(got, expected, atol=1e-4)


def test_regmean_without_off_diagonals_weighs_inputs_by_their_energy():
    weight = draw(2, 4, 3)
    moment = torch.stack([x.T @ x for x in draw(2, 9, 3, seed=1)])
    energy = moment.diagonal(dim1=1, dim2=2)[:, None, :]
    expected = (weight * energy).sum(0) / energy.sum(0)
    got = base.regmean(weight, range(2), moment, off_diagonal=0.0)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(base.regmean(weight, range(2), moment), expected, atol=1e-3)


def test_regmean_keeps_the_mean_where_nothing_was_seen():
    weight, moment = draw(2, 4, 3), torch.zeros(2, 3, 3)
    mean = base.weighted(weight, range(2))
    assert torch.allclose(base.regmean(weight, range(2), moment), mean, atol=1e-6)
    moment[0, 1, 1] = 5.0  # only input 1, only in expert 0
    got = base.regmean(weight, range(2), moment)
    assert torch.allclose(got[:, 1], weight[0, :, 1], atol=1e-5)
    assert torch.allclose(got[:, [0, 2]], mean[:, [0, 2]], atol=1e-6)


def test_ties_by_hand():
    anchor = torch.zeros(1, 5)
    first = torch.tensor([[4.0, -3.0, 1.0, 0.5, 0.0]])
    second = torch.tensor([[-2.0, -5.0, 0.0, 3.0, 0.1]])
    third = torch.tensor([[6.0, 1.0, 0.2, -3.0, 0.1]])
    weight = torch.stack([anchor, first, second, third]) + 10.0
    # Two of five stay in each: (4, -3), (-5, 3), (6, -3). Position 3 has as much plus as minus.
    got = base.ties(weight, range(4), 0, 0.4)
    assert torch.allclose(got, torch.tensor([[15.0, 6.0, 10.0, 10.0, 10.0]]), atol=1e-5)
    # All stay: 4 and 6 beat -2; -3 and -5 beat 1; -3 loses to 0.5 and 3.
    got = base.ties(weight, range(4), 0, 1.0)
    assert torch.allclose(got, torch.tensor([[15.0, 6.0, 10.6, 11.75, 10.1]]), atol=1e-5)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_trim_keeps_the_largest(density):
    difference = draw(7, 9).double()
    kept = base.trim(difference, density)
    count = max(1, round(density * 63))
    assert int((kept != 0).sum()) == count
    assert kept[kept != 0].abs().min() >= difference[kept == 0].abs().max() if count < 63 else True
    assert torch.equal(base.trim(torch.ones(3, 3), density), torch.ones(3, 3))


def test_random_weights_depend_on_the_seed_alone():
    assert torch.equal(base.random_scale(5, 1), base.random_scale(5, 1))
    assert not torch.equal(base.random_scale(5, 1), base.random_scale(5, 2))
    assert bool((base.random_scale(1000, 3) > 0).all())


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight, importance = draw(3, 7, 5), draw(3, 7, 5, seed=1).abs()
    whole = base.weighted(weight, [0, 2], torch.arange(3), importance)
    distances = clusters.differences(weight)
    for module in (base, clusters):
        monkeypatch.setattr(module, "_BLOCK", 31)  # a few rows, the last block a smaller one
    assert torch.equal(base.weighted(weight, [0, 2], torch.arange(3), importance), whole)
    assert torch.allclose(clusters.differences(weight), distances)
