"""Entries of a matrix: where they are, and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mctk.terms.bits import pack_bits, packed_width, unpack_bits
from mctk.terms.indices import (
    SlotMap,
    check_float,
    check_index,
    check_index_dtype,
    check_range,
    check_slots,
    dtype_name,
    place_block,
    place_rows,
    take_columns,
)
from mctk.terms.shape import BankShape
from mctk.terms.term import Term

STORAGES = ("positions", "bitmap")


class Sparse(Term):
    """Entries of a matrix, at explicit positions or where a bitmap says.

    Positions cost 4 bytes an entry, a bitmap 1 bit for each element of the matrix: it is smaller
    from one entry in 32 on. A 2:4 pattern costs that too however it is written. All slots store
    equally many values: a shorter one is padded with zeros, at any position, or after the last bit
    that is set. Applying scatters the entries into a full matrix first: it is a storage format, not
    a fast kernel.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        values: ``[S, n]``; with a bitmap in the order of its bits, row after row.
        positions: ``[S, n]``, int32 (or int64 where a matrix has 2³¹ entries or more), flat
            positions ``row * C + column`` within the ``R × C`` block of the rows and columns, that
            is ``out × in`` without them; what repeats adds up.
        rows: Output rows, ``[R]`` or ``[S, R]``.
        cols: Input columns, ``[C]`` or ``[S, C]``.
        bitmap: Instead of positions: uint8 ``[S, R, ⌈C / 8⌉]``, bit ``j mod 8`` (of value
            ``2^(j mod 8)``) of byte ``⌊j / 8⌋`` of a row is set where column j has a value.
    """

    kind: ClassVar[str] = "sparse"

    def __init__(
        self,
        shape: BankShape,
        slots: Sequence[int | None],
        values: Tensor,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        *,
        bitmap: Tensor | None = None,
    ) -> None:
        if (positions is None) == (bitmap is None):
            raise ValueError("positions: needed, or else a bitmap, and not both")
        if values.dim() != 2:
            raise ValueError(f"values: has shape {list(values.shape)}, expected [slots, entries]")
        stored, entries = values.shape
        check_float("values", values, (stored, entries))
        n_rows = shape.out_features
        n_cols = shape.in_features
        if rows is not None:
            n_rows = check_index("rows", rows, stored, shape.out_features)
        if cols is not None:
            n_cols = check_index("cols", cols, stored, shape.in_features)
        if positions is not None:
            check_index_dtype("positions", positions)
            if tuple(positions.shape) != (stored, entries):
                raise ValueError(
                    f"positions: has shape {list(positions.shape)}, expected {[stored, entries]}"
                )
            check_range("positions", positions, n_rows * n_cols)
        if bitmap is not None:
            _check_bitmap(bitmap, (stored, n_rows, n_cols), entries)
        self.shape = shape
        self.values = values
        self.positions = positions
        self.bitmap = bitmap
        self.rows = rows
        self.cols = cols
        self._slots = check_slots("slots", slots, shape.members, stored)
        self._block = (n_rows, n_cols)

    @property
    def slots(self) -> SlotMap:
        """The stored slot of each member, None where the term is absent."""
        return self._slots

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: values, positions or bitmap, and rows and cols if there are any."""
        names = ("values", "positions", "bitmap", "rows", "cols")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        storage = "plain" if self.bitmap is None else "bitmap"
        return {"slots": list(self._slots), "storage": storage}

    @classmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Sparse:
        """See `Term.build`."""
        return cls(
            shape,
            settings["slots"],
            tensors["values"],
            tensors.get("positions"),
            rows=tensors.get("rows"),
            cols=tensors.get("cols"),
            bitmap=tensors.get("bitmap"),
        )

    def macs(self, member: int) -> int:
        """See `Term.macs`: one per stored entry."""
        return self.values.shape[1] if self.has(member) else 0

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Term.materialise`."""
        slot = self._slots[member]
        if slot is None:
            return None, None
        size = (self.shape.out_features, self.shape.in_features)
        return place_block(self._scatter(slot), self.rows, slot, self.cols, slot, size), None

    def apply(self, x: Tensor, member: int) -> Tensor:
        """See `Term.apply`."""
        self._check_input(x)
        slot = self._slots[member]
        if slot is None:
            return self._no_output(x)
        part = F.linear(take_columns(x, self.cols, slot), self._scatter(slot))
        return place_rows(part, self.rows, slot, self.shape.out_features)

    def _scatter(self, slot: int) -> Tensor:
        """Returns the block ``[R, C]`` of a slot."""
        values = self.values[slot]
        if self.bitmap is not None:
            mask = unpack_bits(self.bitmap[slot], 1, self._block[1]).bool()
            return values.new_zeros(self._block).masked_scatter(mask, values)
        assert self.positions is not None
        block = values.new_zeros(self._block[0] * self._block[1])
        block = block.scatter_add(0, self.positions[slot].long(), values)
        return block.view(self._block)


def sparse_from_mask(
    shape: BankShape,
    slots: Sequence[int | None],
    dense: Tensor,
    mask: Tensor,
    storage: str = "bitmap",
    *,
    entries: int | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
) -> Sparse:
    """Returns the entries of matrices that a mask keeps.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        dense: ``[S, R, C]``.
        mask: bool ``[S, R, C]``, true where an entry stays.
        storage: "bitmap" or "positions".
        entries: Values stored per slot; by default the most that a slot keeps. Needed on the meta
            device, where a mask has no values.
        rows: Output rows, ``[R]`` or ``[S, R]``.
        cols: Input columns, ``[C]`` or ``[S, C]``.

    Raises:
        ValueError: A slot keeps more than `entries`.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage: must be {' or '.join(STORAGES)}, not {storage!r}")
    stored, n_rows, n_cols = dense.shape
    flat, kept = dense.reshape(stored, -1), mask.reshape(stored, -1)
    if dense.is_meta:
        if entries is None:
            raise ValueError("entries: needed without data")
    else:
        most = int(kept.sum(1).max()) if kept.numel() else 0
        if entries is not None and most > entries:
            raise ValueError(f"entries: is {entries}, a slot keeps {most}")
        entries = most if entries is None else entries
    values = dense.new_zeros(stored, entries)
    index_dtype = torch.int32 if n_rows * n_cols < 2**31 else torch.int64
    positions = torch.zeros(stored, entries, dtype=index_dtype, device=dense.device)
    if not dense.is_meta:
        for slot in range(stored):
            places = kept[slot].nonzero()[:, 0]
            values[slot, : places.numel()] = flat[slot, places]
            positions[slot, : places.numel()] = places.to(index_dtype)
    if storage == "positions":
        return Sparse(shape, slots, values, positions, rows, cols)
    return Sparse(shape, slots, values, rows=rows, cols=cols, bitmap=pack_bits(mask, 1))


def _check_bitmap(bitmap: Tensor, size: tuple[int, int, int], entries: int) -> None:
    """Checks a bitmap for matrices of a size ``(S, R, C)`` of which `entries` values are stored."""
    stored, rows, cols = size
    expected = [stored, rows, packed_width(cols, 1)]
    if list(bitmap.shape) != expected or bitmap.dtype != torch.uint8:
        raise ValueError(
            f"bitmap: is {dtype_name(bitmap.dtype)} {list(bitmap.shape)}, expected uint8 {expected}"
        )
    if bitmap.is_meta:
        return
    for slot in range(stored):
        bits = unpack_bits(bitmap[slot], 1, 8 * expected[2])
        if bool(bits[:, cols:].any()):
            raise ValueError(f"bitmap: slot {slot} has bits set after the last column")
        count = int(bits.sum(dtype=torch.int64))
        if count > entries:
            raise ValueError(f"bitmap: slot {slot} has {count} bits set, {entries} values stored")
