"""What a term computes is what it materialises to, and a bank is the sum of its terms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.terms import Bank, BankShape, Bias, Dense, LowRank
from term_strategies import KINDS, terms


def dense_output(weight, bias, x, out_features):
    total = x.new_zeros(x.shape[0], out_features)
    if weight is not None:
        assert weight.shape == (out_features, x.shape[1])
        total = total + x @ weight.t()
    return total if bias is None else total + bias


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_apply_is_materialise(kind, data):
    term = data.draw(terms(kind))
    x = torch.randn(3, term.shape.in_features, dtype=torch.float64)
    for member in range(term.shape.members):
        weight, bias = term.materialise(member)
        assert (weight is None and bias is None) == (not term.has(member))
        expected = dense_output(weight, bias, x, term.shape.out_features)
        torch.testing.assert_close(term.apply(x, member), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bank_is_the_sum_of_its_terms(data):
    shape = BankShape(3, 5, 4)
    parts = data.draw(st.lists(terms(shape=shape), max_size=4))
    bank = Bank("experts.gate", 0, shape, parts)
    x = torch.randn(2, 4, dtype=torch.float64)
    for member in range(3):
        weight, bias = bank.materialise(member)
        torch.testing.assert_close(
            bank.apply(x, member), dense_output(weight, bias, x, 5), rtol=1e-10, atol=1e-10
        )
        assert bank.macs(member) == sum(part.macs(member) for part in parts)
    assert bank.parameters() == sum(part.parameters() for part in parts)
    assert bank.nbytes() == sum(part.nbytes() for part in parts)


def test_rows_and_columns_touch_nothing_else():
    shape = BankShape(2, 4, 5)
    term = Dense(
        shape,
        [0, 1],
        torch.ones(2, 2, 3),
        rows=torch.tensor([[0, 3], [1, 2]]),
        cols=torch.tensor([4, 0, 1]),
    )
    weight, _ = term.materialise(1)
    expected = torch.zeros(4, 5)
    expected[torch.tensor([[1], [2]]), torch.tensor([0, 1, 4])] = 1
    assert torch.equal(weight, expected)
    assert term.macs(1) == 6


def test_macs_count_the_multiplications():
    shape = BankShape(3, 6, 5)
    plain = LowRank(
        shape, [0, None, 1], [0, None, 1], U=torch.randn(2, 6, 2), V=torch.randn(2, 2, 5)
    )
    assert [plain.macs(e) for e in range(3)] == [22, 0, 22]
    assert [plain.pivot().macs(e) for e in range(3)] == [18, 0, 18]
    assert Bias(shape, [0, 0, 0], torch.randn(1, 6)).macs(0) == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_dtypes_are_never_mixed(kind, data):
    term = data.draw(terms(kind))
    x = torch.randn(2, term.shape.in_features)
    with pytest.raises(TypeError, match="float32"):
        term.apply(x, 0)
    narrow = term.to(dtype=torch.bfloat16)
    assert narrow.apply(x.bfloat16(), 0).dtype == torch.bfloat16
    kept = {name: t.dtype for name, t in term.tensors().items() if not t.is_floating_point()}
    assert {n: narrow.tensors()[n].dtype for n in kept} == kept


def test_wrong_input_shape_and_foreign_terms():
    shape = BankShape(1, 3, 4)
    term = Dense(shape, [0], torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match=r"expected \[T, 4\]"):
        term.apply(torch.randn(2, 3), 0)
    with pytest.raises(ValueError, match=r"mlp\.up of layer 7"):
        Bank("mlp.up", 7, BankShape(1, 4, 3), [term])


def test_output_may_be_changed_in_place():
    shape = BankShape(1, 3, 2)
    term = Bias(shape, [0], torch.ones(1, 3))
    term.apply(torch.zeros(2, 2), 0).add_(1)
    assert torch.equal(term.vector, torch.ones(1, 3))
