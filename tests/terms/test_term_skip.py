"""The skip term: which choices it skips, and that it survives what happens to terms."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mctk.errors import CheckpointError
from mctk.terms import (
    Bank,
    BankShape,
    Dense,
    ExpertSkip,
    Term,
    compact,
    drop_members,
    pack,
    removed_members,
    spec_bytes,
)

SHAPE = BankShape(4, 5, 3)


def test_the_second_of_two_is_skipped_below_the_ratio():
    weights = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.5, 0.5], [0.0, 0.0]])
    found, kept = ExpertSkip(SHAPE, [0.5], [0.4, 0.6]).skip(weights)
    assert kept.tolist() == [[True, True], [True, False], [False, True], [True, True], [True, True]]
    expected = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    assert torch.allclose(found, expected)
    assert torch.equal(found[kept.all(1)], weights[kept.all(1)])


@given(st.integers(2, 6), st.integers(0, 1000))
def test_of_several_the_smallest_go_and_the_sum_stays(k, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(40, k, generator=generator, dtype=torch.float64) + 0.01
    ratios = torch.rand(k - 1, generator=generator, dtype=torch.float64).tolist()
    found, kept = ExpertSkip(SHAPE, ratios, [1.0] + [0.0] * (k - 1)).skip(weights)
    assert torch.allclose(found.sum(1), weights.sum(1))
    for row in range(40):
        ranked = sorted(weights[row].tolist(), reverse=True)
        gone = sum(w < ratio * ranked[0] for w, ratio in zip(ranked[1:], ratios, strict=True))
        assert int(kept[row].sum()) == k - gone
        if gone:
            assert weights[row][kept[row]].min() >= weights[row][~kept[row]].max()
            assert found[row][~kept[row]].eq(0).all()
    none, all_kept = ExpertSkip(SHAPE).skip(weights)
    assert torch.equal(none, weights) and bool(all_kept.all())


def test_it_stores_nothing_and_comes_back_from_its_spec():
    term = ExpertSkip(SHAPE, [0.4375, 0.1], [0.25, 0.25, 0.5])
    spec = json.loads(json.dumps(term.spec()))
    back = Term.from_spec(spec, {})
    assert isinstance(back, ExpertSkip) and back.spec() == spec
    assert (back.ratios, back.shares) == (term.ratios, term.shares)
    assert term.parameters() == term.nbytes() == spec_bytes(spec) == term.macs(0) == 0
    assert not any(term.has(member) for member in range(4))
    assert term.to(torch.bfloat16, "cpu").spec() == spec
    assert term.apply(torch.zeros(2, 3, dtype=torch.bfloat16), 1).tolist() == [[0] * 5] * 2


def test_it_stays_where_experts_go_and_serves_nobody():
    bank = Bank("experts.down", 0, SHAPE, [Dense(SHAPE, range(4), torch.randn(4, 5, 3))])
    bank.terms.append(ExpertSkip(SHAPE, [0.5], [0.5, 0.5]))
    dropped = Bank("experts.down", 0, SHAPE, drop_members(bank, [1, 2]))
    assert removed_members([dropped]) == (1, 2)
    small = compact(dropped, [0, 3])
    assert [term.kind for term in small.terms] == ["dense", "skip"]
    assert small.terms[1].shape == BankShape(2, 5, 3) and small.terms[1].ratios == (0.5,)
    assert torch.equal(small.materialise(1)[0], bank.materialise(3)[0])
    assert pack(bank.terms[1], 4).spec() == bank.terms[1].spec()


@pytest.mark.parametrize(
    ("ratios", "shares", "message"),
    [
        ([0.5], [1.0], "shares: has 1 entries, expected 2"),
        ([-0.5], [0.5, 0.5], "ratios: must be a list of numbers"),
        ([0.5], [0.5, 0.2], "shares: add up to 0.7"),
        (["a"], [0.5, 0.5], "ratios: must be a list of numbers"),
    ],
)
def test_what_it_refuses(ratios, shares, message):
    with pytest.raises(ValueError, match=message):
        ExpertSkip(SHAPE, ratios, shares)
    spec = ExpertSkip(SHAPE, [0.5], [0.5, 0.5]).spec() | {"ratios": ratios, "shares": shares}
    with pytest.raises(CheckpointError, match=message):
        Term.from_spec(spec, {})
    with pytest.raises(ValueError, match="choose 3 experts, the skip term is for 2"):
        ExpertSkip(SHAPE, [0.5], [0.5, 0.5]).skip(torch.ones(1, 3))
