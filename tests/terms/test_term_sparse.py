"""Sparse terms: bitmaps and positions hold the same entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import CheckpointError
from mctk.terms import Bank, BankShape, Sparse, Term, compact, pack, sparse_from_mask

SHAPE = BankShape(3, 5, 11)


def example(storage, seed=0, kept=0.4, **options):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 5, 11, generator=random)
    mask = torch.rand(2, 5, 11, generator=random) < kept
    return dense, mask, sparse_from_mask(SHAPE, [0, None, 1], dense, mask, storage, **options)


@pytest.mark.parametrize("storage", ["bitmap", "positions"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_both_storages_hold_what_the_mask_keeps(storage, seed, kept):
    dense, mask, term = example(storage, seed, kept)
    for member, slot in ((0, 0), (2, 1)):
        assert torch.equal(term.materialise(member)[0], dense[slot] * mask[slot])
    assert term.materialise(1) == (None, None)
    x = torch.randn(4, 11, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(term.apply(x, 2), x @ (dense[1] * mask[1]).T)
    most = int(mask.sum((1, 2)).max())
    assert term.parameters() == 2 * most and term.macs(0) == most
    where = 2 * 5 * 2 if storage == "bitmap" else 4 * 2 * most
    assert term.nbytes() == 4 * 2 * most + where
    again = Term.from_spec(term.spec(), term.stored())
    assert again.spec() == term.spec() and torch.equal(
        again.materialise(2)[0], term.materialise(2)[0]
    )
    meta = sparse_from_mask(
        SHAPE, [0, None, 1], dense.to("meta"), mask.to("meta"), storage, entries=most
    )
    assert meta.spec() == term.spec()
    empty = torch.empty(4, 11, device="meta")
    assert meta.apply(empty, 0).shape == (4, 5)


@pytest.mark.parametrize("storage", ["bitmap", "positions"])
def test_within_rows_and_columns(storage):
    rows = torch.tensor([[4, 0], [1, 2]])
    cols = torch.tensor([10, 3, 7]).int()
    dense = torch.randn(2, 2, 3)
    mask = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 1, 1], [1, 0, 0]]]).bool()
    term = sparse_from_mask(SHAPE, [0, None, 1], dense, mask, storage, rows=rows, cols=cols)
    expected = torch.zeros(5, 11)
    for i, row in enumerate([1, 2]):
        for j, col in enumerate([10, 3, 7]):
            expected[row, col] = dense[1, i, j] * mask[1, i, j]
    assert torch.equal(term.materialise(2)[0], expected)
    assert Term.from_spec(term.spec(), term.stored()).spec() == term.spec()
    left = compact(Bank("experts.up", 0, SHAPE, [term]), [2])
    assert torch.equal(left.materialise(0)[0], expected)


def test_values_may_be_packed():
    _, mask, term = example("bitmap")
    packed = pack(term, 8)
    assert packed.nbytes() < term.nbytes()
    torch.testing.assert_close(packed.materialise(2)[0], term.materialise(2)[0], atol=0.02, rtol=0)
    assert not packed.materialise(2)[0][~mask[1]].any()


def test_too_many_entries_are_refused():
    with pytest.raises(ValueError, match=r"entries: is 3, a slot keeps \d+"):
        example("bitmap", entries=3)
    with pytest.raises(ValueError, match="storage: must be positions or bitmap, not 'csr'"):
        example("csr")
    with pytest.raises(ValueError, match="entries: needed"):
        sparse_from_mask(
            SHAPE, [0, 0, 0], torch.empty(1, 5, 11, device="meta"), torch.empty(1, 5, 11)
        )
    with pytest.raises(ValueError, match="positions: needed, or else a bitmap"):
        Sparse(SHAPE, [0, None, 1], torch.zeros(2, 3))


def test_bad_bitmaps_are_refused():
    _, _, term = example("bitmap")
    stored = term.stored()

    def refuse(match, bitmap):
        spec = term.spec()
        dtype = str(bitmap.dtype).removeprefix("torch.")
        spec["tensors"]["bitmap"] = {"shape": list(bitmap.shape), "dtype": dtype}
        with pytest.raises(CheckpointError, match=match):
            Term.from_spec(spec, {**stored, "bitmap": bitmap})

    refuse(r"bitmap: is uint8 \[2, 5, 1\], expected uint8 \[2, 5, 2\]", stored["bitmap"][..., :1])
    refuse(r"bitmap: is int32", stored["bitmap"].int())
    late = stored["bitmap"].clone()
    late[1, 0, 1] |= 0b1000
    refuse(r"bitmap: slot 1 has bits set after the last column", late)
    full = torch.full_like(stored["bitmap"], 255)
    full[..., 1] = 0b111
    refuse(r"bitmap: slot 0 has 55 bits set, \d+ values stored", full)
