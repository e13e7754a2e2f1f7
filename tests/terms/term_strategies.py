"""Hypothesis strategies: random terms of every kind, with sharing, absence, rows and columns."""

import torch
from hypothesis import strategies as st
from mctk.terms import BankShape, Bias, Dense, LowRank, Sparse

KINDS = ("dense", "bias", "sparse", "plain", "pivoted")


@st.composite
def terms(draw, kind=None, shape=None, dtype=torch.float64):
    """A term with random values: ``kind`` is one of KINDS, by default any."""
    kind = draw(st.sampled_from(KINDS)) if kind is None else kind
    if shape is None:
        shape = BankShape(*(draw(st.integers(1, high)) for high in (4, 7, 6)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def values(*size):
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    def index_set(stored, bound):
        if not draw(st.booleans()):
            return None, bound
        count = draw(st.integers(1, bound))
        dtype_of_index = draw(st.sampled_from([torch.int32, torch.int64]))
        per_slot = draw(st.booleans())
        picked = [
            torch.randperm(bound, generator=random)[:count]
            for _ in range(stored if per_slot else 1)
        ]
        index = torch.stack(picked) if per_slot else picked[0]
        return index.to(dtype_of_index), count

    def slot_map(stored):
        entry = st.none() | st.integers(0, stored - 1)
        return draw(st.lists(entry, min_size=shape.members, max_size=shape.members))

    stored = draw(st.integers(1, shape.members))
    rows, n_rows = index_set(stored, shape.out_features)
    if kind == "bias":
        return Bias(shape, slot_map(stored), values(stored, n_rows), rows=rows)
    if kind in ("dense", "sparse"):
        cols, n_cols = index_set(stored, shape.in_features)
        slots = slot_map(stored)
        if kind == "dense":
            return Dense(shape, slots, values(stored, n_rows, n_cols), rows=rows, cols=cols)
        entries = draw(st.integers(0, 2 * n_rows * n_cols))
        positions = torch.randint(0, n_rows * n_cols, (stored, entries), generator=random)
        return Sparse(shape, slots, values(stored, entries), positions.int(), rows=rows, cols=cols)
    # Low rank: one factor may be shared among the slots of the other, so that it can be pivoted.
    sharing = draw(st.sampled_from(["none", "U", "V"]))
    u_slots = slot_map(stored)
    v_slots = list(u_slots)
    stored_u = stored_v = stored
    if sharing == "V":
        stored_v = 1
        v_slots = [None if slot is None else 0 for slot in u_slots]
    elif sharing == "U":
        stored_u = 1
        u_slots = [None if slot is None else 0 for slot in v_slots]
        rows, n_rows = index_set(1, shape.out_features)
    cols, n_cols = index_set(stored_v, shape.in_features)
    rank = draw(st.integers(0, min(n_rows, n_cols)))
    term = LowRank(
        shape,
        u_slots,
        v_slots,
        U=values(stored_u, n_rows, rank),
        V=values(stored_v, rank, n_cols),
        rows=rows,
        cols=cols,
    )
    return term.pivot() if kind == "pivoted" else term
