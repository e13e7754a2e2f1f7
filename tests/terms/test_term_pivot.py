"""Pivoted storage is exact and stores r² fewer numbers per slot of the pivoted factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.terms import BankShape, Dense, LowRank
from mctk.terms.pivot import pivot_rows
from term_strategies import terms


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pivoting_changes_nothing_but_the_size(data):
    plain = data.draw(terms("plain"))
    pivoted = plain.pivot()
    fewer = min(plain.stored_u, plain.stored_v)
    assert pivoted.parameters() == plain.parameters() - fewer * plain.rank**2
    if isinstance(pivoted, Dense):
        for member in range(plain.shape.members):
            exact, same = plain.materialise(member)[0], pivoted.materialise(member)[0]
            assert (exact is None) == (same is None)
            if exact is not None:
                torch.testing.assert_close(same, exact, rtol=1e-8, atol=1e-8)
        return
    assert pivoted.storage == "pivoted"
    assert pivoted.side == ("V" if plain.stored_v < plain.stored_u else "U")
    x = torch.randn(3, plain.shape.in_features, dtype=torch.float64)
    for member in range(plain.shape.members):
        expected = plain.apply(x, member)
        torch.testing.assert_close(pivoted.apply(x, member), expected, rtol=1e-8, atol=1e-8)
        if plain.has(member):
            saved = plain.rank**2
            assert pivoted.macs(member) == plain.macs(member) - saved
            U, V = pivoted.factors(member)
            full_u, full_v = plain.factors(member)
            torch.testing.assert_close(U @ V, full_u @ full_v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_exact_to_rounding(dtype, shared):
    torch.manual_seed(0)
    shape = BankShape(3, 96, 64)
    plain = LowRank(
        shape,
        [0, 1, 2],
        [0, 0, 0] if shared else [0, 1, 2],
        U=torch.randn(3, 96, 40, dtype=dtype),
        V=torch.randn(1 if shared else 3, 40, 64, dtype=dtype),
    )
    pivoted = plain.pivot()
    assert pivoted.dtype == dtype
    assert pivoted.side == ("V" if shared else "U")
    x = torch.randn(10, 64, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for member in range(3):
        exact = x.double() @ plain.materialise(member)[0].double().t()
        error = (pivoted.apply(x, member).double() - exact).norm() / exact.norm()
        assert error < 50 * eps
    assert pivoted.C.abs().max() <= 2.0


def test_shared_u_holds_the_identity():
    shape = BankShape(3, 5, 4)
    U, V = torch.randn(1, 5, 2), torch.randn(3, 2, 4)
    pivoted = LowRank(shape, [0, 0, 0], [2, 0, 1], U=U, V=V).pivot()
    assert pivoted.side == "U"
    assert pivoted.parameters() == 3 * 2 + 3 * 2 * 4
    weight, _ = pivoted.materialise(0)
    torch.testing.assert_close(weight, U[0] @ V[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank_of_factor", [0, 1, 3])
def test_factors_without_full_rank(rank_of_factor):
    torch.manual_seed(1)
    thin = torch.randn(9, rank_of_factor, dtype=torch.float64)
    U = (thin @ torch.randn(rank_of_factor, 4, dtype=torch.float64))[None]
    V = torch.randn(1, 4, 7, dtype=torch.float64)
    pivoted = LowRank(BankShape(1, 9, 7), [0], [0], U=U, V=V).pivot()
    torch.testing.assert_close(pivoted.materialise(0)[0], (U @ V)[0], rtol=1e-12, atol=1e-12)
    assert pivoted.C.abs().max() <= 2.0


def test_rows_are_exchanged_until_coefficients_are_small():
    # The classic matrix on which partial pivoting lets coefficients grow as 2^r.
    n = 24
    lower = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64).tril(-1)
    factor = torch.cat([lower, torch.ones(8, n, dtype=torch.float64)])
    pivots, rest, top = pivot_rows(factor)
    assert rest.abs().max() <= 2.0
    assert torch.equal(pivots, pivots.sort().values)
    others = [i for i in range(n + 8) if i not in pivots.tolist()]
    torch.testing.assert_close(rest @ top, factor[others], rtol=1e-10, atol=1e-10)


def test_what_has_no_pivoted_form():
    shape = BankShape(3, 5, 4)
    crosswise = LowRank(shape, [0, 0, 1], [0, 1, 1], U=torch.randn(2, 5, 2), V=torch.randn(2, 2, 4))
    with pytest.raises(ValueError, match="crosswise"):
        crosswise.pivot()
    wide = LowRank(BankShape(1, 3, 9), [0], [0], U=torch.randn(1, 3, 5), V=torch.randn(1, 5, 9))
    with pytest.raises(ValueError, match="rank 5"):
        wide.pivot()
    pivoted = LowRank(BankShape(1, 5, 4), [0], [0], U=torch.randn(1, 5, 2), V=torch.randn(1, 2, 4))
    pivoted = pivoted.pivot()
    assert pivoted.pivot() is pivoted


def test_pivots_need_not_be_sorted():
    C = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    term = LowRank(
        BankShape(1, 4, 2),
        [0],
        [0],
        C=C,
        pivots=torch.tensor([[3, 1]], dtype=torch.int32),
        V=torch.eye(2)[None],
    )
    expected = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 4.0], [1.0, 0.0]])
    assert torch.equal(term.materialise(0)[0], expected)
    assert torch.equal(term.apply(torch.eye(2), 0), expected.t())


@pytest.mark.parametrize(("lefts", "rights", "out", "into"), [(3, 3, 5, 9), (3, 1, 9, 5)])
def test_at_full_rank_a_dense_term_is_left(lefts, rights, out, into):
    generator = torch.Generator().manual_seed(4)
    rank = min(out, into)
    U = torch.randn(lefts, out, rank, generator=generator)
    V = torch.randn(rights, rank, into, generator=generator)
    u_slots, v_slots = [0, 1, 2], [0, 1, 2] if rights == 3 else [0, 0, 0]
    plain = LowRank(BankShape(3, out, into), u_slots, v_slots, U=U, V=V)
    whole = plain.pivot()
    assert isinstance(whole, Dense)
    assert all(tensor.numel() for tensor in whole.tensors().values())
    for member in range(3):
        product = plain.materialise(member)[0]
        assert torch.allclose(whole.materialise(member)[0], product, atol=1e-4)
