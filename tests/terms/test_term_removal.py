"""Removing members: the others compute what they did, what nobody uses is not stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mctk.terms import (
    Bank,
    BankShape,
    Bias,
    Dense,
    DynamicDense,
    LowRank,
    Term,
    compact,
    drop_members,
    removed_members,
)
from term_strategies import terms

SHAPE = BankShape(4, 3, 5)


@st.composite
def banks(draw):
    shape = BankShape(draw(st.integers(2, 5)), 3, 4)
    return Bank("experts.up", 0, shape, draw(st.lists(terms(shape=shape), max_size=3)))


@given(banks(), st.data())
def test_the_others_stay_as_they_were(bank, data):
    gone = set(data.draw(st.sets(st.integers(0, bank.shape.members - 1))))
    if len(gone) == bank.shape.members:
        with pytest.raises(ValueError, match="would go"):
            drop_members(bank, gone)
        return
    left = Bank(bank.name, bank.layer, bank.shape, drop_members(bank, gone))
    assert gone <= set(removed_members([left]))
    small = compact(left, [m for m in range(bank.shape.members) if m not in gone])
    assert small.parameters() <= left.parameters() <= bank.parameters()
    x = torch.randn(6, 4, dtype=torch.float64)
    for place, member in enumerate(m for m in range(bank.shape.members) if m not in gone):
        for now, index in ((left, member), (small, place)):
            assert torch.equal(now.apply(x, index), bank.apply(x, member))
            assert now.macs(index) == bank.macs(member)
    for member in gone:
        assert not any(term.has(member) for term in left.terms)
    for term in [*left.terms, *small.terms]:
        Term.from_spec(term.spec(), term.tensors())
    for term in drop_members(bank, gone):
        if any(old.has(member) for old in bank.terms for member in gone):
            continue
        assert term in bank.terms  # untouched: the very same


@given(banks(), st.data())
def test_compact_renumbers_in_the_given_order(bank, data):
    kept = data.draw(st.lists(st.integers(0, bank.shape.members - 1), min_size=1, unique=True))
    x = torch.randn(2, 4, dtype=torch.float64)
    small = compact(bank, kept)
    assert small.shape.members == len(kept)
    for place, member in enumerate(kept):
        assert torch.equal(small.apply(x, place), bank.apply(x, member))


def test_nothing_that_nobody_uses_is_stored():
    weight = torch.randn(4, 3, 5)
    rows = torch.tensor([[0, 1], [1, 2]])
    bank = Bank(
        "experts.down",
        0,
        SHAPE,
        [
            Dense(SHAPE, range(4), weight),
            Bias(SHAPE, [None, 0, None, 1], torch.randn(2, 2), rows=rows),
            LowRank(
                SHAPE, [0, 1, 2, 3], [0, 0, 1, 1], U=torch.randn(4, 3, 2), V=torch.randn(2, 2, 5)
            ),
            DynamicDense(
                SHAPE,
                [0, 1, 1, 0],
                torch.randn(2, 3, 5),
                drop=1,
                axis="cols",
                energy=torch.ones(2, 5),
            ),
        ],
    )
    dense, bias, low, dynamic = drop_members(bank, [1, 2])
    assert dense.slots == (0, None, None, 1) and torch.equal(dense.weight, weight[[0, 3]])
    assert bias.slots == (None, None, None, 0) and bias.rows.tolist() == [[1, 2]]
    assert low.u_slots == (0, None, None, 1) and low.v_slots == (0, None, None, 1)
    assert dynamic.slots == (0, None, None, 0) and dynamic.energy.shape == (1, 5)
    assert [len(t.tensors()) for t in (dense, bias, low, dynamic)] == [1, 2, 2, 2]
    # A term that served only those who are gone goes as well.
    assert len(drop_members(bank, [1, 3])) == 3


def test_shared_rows_and_cols_stay():
    cols = torch.tensor([0, 2])
    term = Dense(SHAPE, range(4), torch.randn(4, 3, 2), cols=cols)
    (left,) = drop_members(Bank("experts.up", 0, SHAPE, [term]), [0])
    assert torch.equal(left.cols, cols) and left.weight.shape == (3, 3, 2)


def test_an_expert_is_removed_if_no_bank_has_it():
    def bank(name, slots):
        count = len({slot for slot in slots if slot is not None})
        return Bank(name, 0, SHAPE, [Dense(SHAPE, slots, torch.zeros(count, 3, 5))])

    gone = [0, None, 1, None]
    layer = [bank("experts.gate", gone), bank("experts.up", gone), bank("experts.down", gone)]
    assert removed_members([*layer, bank("attention.q", range(4))]) == (1, 3)
    # Replaced by a constant: routing stays.
    layer[2].terms.append(Bias(SHAPE, [None, 0, None, None], torch.ones(1, 3)))
    assert removed_members(layer) == (3,)
    assert removed_members([]) == ()


def test_wrong_members_are_refused():
    bank = Bank("experts.up", 2, SHAPE, [Dense(SHAPE, range(4), torch.zeros(4, 3, 5))])
    with pytest.raises(ValueError, match=r"members 0\.\.3, not 4"):
        drop_members(bank, [4])
    for kept in ([], [1, 1], [7]):
        with pytest.raises(ValueError, match="layer 2"):
            compact(bank, kept)
