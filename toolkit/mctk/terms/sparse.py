"""A few entries per slot, at explicit positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from mctk.terms.indices import (
    SlotMap,
    check_float,
    check_index,
    check_index_dtype,
    check_range,
    check_slots,
    place_block,
    place_rows,
    take_columns,
)
from mctk.terms.shape import BankShape
from mctk.terms.term import Term


class Sparse(Term):
    """Entries of a matrix at flat positions ``row * C + column``; what repeats adds up.

    All slots store equally many entries: pad a shorter one with zeros at any position. Applying
    scatters the entries into a full matrix first: it is a storage format, not a fast kernel.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        values: ``[S, n]``.
        positions: ``[S, n]``, int32 (or int64 where a matrix has 2³¹ entries or more), within
            the ``R × C`` block of the rows and columns, that is ``out × in`` without them.
        rows: Output rows, ``[R]`` or ``[S, R]``.
        cols: Input columns, ``[C]`` or ``[S, C]``.
    """

    kind: ClassVar[str] = "sparse"

    def __init__(
        self,
        shape: BankShape,
        slots: Sequence[int | None],
        values: Tensor,
        positions: Tensor,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
    ) -> None:
        if values.dim() != 2:
            raise ValueError(f"values: has shape {list(values.shape)}, expected [slots, entries]")
        stored, entries = values.shape
        check_float("values", values, (stored, entries))
        check_index_dtype("positions", positions)
        if tuple(positions.shape) != (stored, entries):
            raise ValueError(
                f"positions: has shape {list(positions.shape)}, expected {[stored, entries]}"
            )
        n_rows = shape.out_features
        n_cols = shape.in_features
        if rows is not None:
            n_rows = check_index("rows", rows, stored, shape.out_features)
        if cols is not None:
            n_cols = check_index("cols", cols, stored, shape.in_features)
        check_range("positions", positions, n_rows * n_cols)
        self.shape = shape
        self.values = values
        self.positions = positions
        self.rows = rows
        self.cols = cols
        self._slots = check_slots("slots", slots, shape.members, stored)
        self._block = (n_rows, n_cols)

    @property
    def slots(self) -> SlotMap:
        """The stored slot of each member, None where the term is absent."""
        return self._slots

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: values, positions, and rows and cols if there are any."""
        tensors = {"values": self.values, "positions": self.positions}
        if self.rows is not None:
            tensors["rows"] = self.rows
        if self.cols is not None:
            tensors["cols"] = self.cols
        return tensors

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {"slots": list(self._slots), "storage": "plain"}

    @classmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Sparse:
        """See `Term.build`."""
        return cls(
            shape,
            settings["slots"],
            tensors["values"],
            tensors["positions"],
            rows=tensors.get("rows"),
            cols=tensors.get("cols"),
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
        block = self.values.new_zeros(self._block[0] * self._block[1])
        block = block.scatter_add(0, self.positions[slot].long(), self.values[slot])
        return block.view(self._block)
