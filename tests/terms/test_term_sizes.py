"""Size curves count what the terms count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.terms import DENSE, BankShape, LowRank, SizeCurve, rank_settings


def empty_term(shape, u_slots, v_slots, rank, storage):
    def meta(*size):
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    out, inner = shape.out_features, shape.in_features
    maps = (
        [min(e, u_slots - 1) for e in range(shape.members)],
        [min(e, v_slots - 1) for e in range(shape.members)],
    )
    if storage == "plain":
        return LowRank(shape, *maps, U=meta(u_slots, out, rank), V=meta(v_slots, rank, inner))
    fewer = min(u_slots, v_slots)
    pivots = torch.empty(fewer, rank, dtype=torch.int32, device="meta")
    if v_slots < u_slots:
        U, C = meta(u_slots, out, rank), meta(v_slots, rank, inner - rank)
        return LowRank(shape, *maps, U=U, C=C, pivots=pivots)
    C, V = meta(u_slots, out - rank, rank), meta(v_slots, rank, inner)
    return LowRank(shape, *maps, C=C, V=V, pivots=pivots)


@settings(max_examples=80, deadline=None)
@given(
    members=st.integers(1, 4),
    out=st.integers(1, 40),
    inner=st.integers(1, 40),
    multiple=st.sampled_from([1, 3, 8]),
    storage=st.sampled_from(["plain", "pivoted"]),
    sharing=st.sampled_from(["none", "U", "V"]),
    element_bytes=st.sampled_from([None, 2]),
)
def test_settings_count_what_terms_count(
    members, out, inner, multiple, storage, sharing, element_bytes
):
    shape = BankShape(members, out, inner)
    u_slots = 1 if sharing == "U" else members
    v_slots = 1 if sharing == "V" else members
    ranks, costs = rank_settings(shape, u_slots, v_slots, multiple, storage, element_bytes)
    SizeCurve((0, 0, "bank"), ranks, costs)
    assert ranks[-1] == DENSE
    assert costs[-1] == members * out * inner * (element_bytes or 1)
    for rank, cost in zip(ranks[:-1], costs[:-1], strict=True):
        assert rank % multiple == 0
        term = empty_term(shape, u_slots, v_slots, rank, storage)
        assert cost == (term.parameters() if element_bytes is None else term.nbytes())


def test_plain_ends_at_break_even_and_pivoted_below_full():
    shape = BankShape(1, 64, 32)
    plain, _ = rank_settings(shape, 1, 1, 1, "plain")
    assert plain == (*range(1, 22), DENSE)  # 64·32 / 96 = 21.3
    pivoted, costs = rank_settings(shape, 1, 1, 1, "pivoted")
    assert pivoted == (*range(1, 32), DENSE)
    assert costs[-2] == 31 * (64 + 32 - 31)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="storage"):
        rank_settings(BankShape(1, 4, 4), 1, 1, 1, "dense")
    with pytest.raises(ValueError, match="multiple"):
        rank_settings(BankShape(1, 4, 4), 1, 1, 0, "plain")


@pytest.mark.parametrize(
    ("ranks", "cost", "error", "match"),
    [
        ((), (), None, "0 settings"),
        ((1, 2), (1,), None, "2 settings and 1 costs"),
        ((DENSE, 2), (1, 2), None, "only the last"),
        ((1, 2), (2, 2), None, "strictly"),
        ((1, 2), (1, 2), (1.0,), "2 costs and 1 errors"),
        ((1, 2), (1, 2), (1.0, 2.0), "must not increase"),
        ((1, 2), (1, 2), (float("nan"), 0.0), "finite"),
        ((1, 2), (1, 2), (0.0, -1.0), "not negative"),
    ],
)
def test_bad_curves_are_refused(ranks, cost, error, match):
    with pytest.raises(ValueError, match=match):
        SizeCurve((0, 3, "experts.up"), ranks, cost, error)
