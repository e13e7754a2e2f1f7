"""Full matrices and constant outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from mctk.terms.indices import (
    SlotMap,
    check_float,
    check_index,
    check_slots,
    place_block,
    place_rows,
    take_columns,
)
from mctk.terms.shape import BankShape
from mctk.terms.term import Term


class Dense(Term):
    """A full matrix per slot, or the block of it in some rows and columns.

    One slot for all members is a shared base; fewer slots than members are merged groups.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        weight: ``[S, out, in]``, or ``[S, R, C]`` with rows and columns.
        rows: Output rows, ``[R]`` or ``[S, R]``.
        cols: Input columns, ``[C]`` or ``[S, C]``.
    """

    kind: ClassVar[str] = "dense"

    def __init__(
        self,
        shape: BankShape,
        slots: Sequence[int | None],
        weight: Tensor,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
    ) -> None:
        stored = weight.shape[0] if weight.dim() else 0
        n_rows = shape.out_features
        n_cols = shape.in_features
        if rows is not None:
            n_rows = check_index("rows", rows, stored, shape.out_features)
        if cols is not None:
            n_cols = check_index("cols", cols, stored, shape.in_features)
        check_float("weight", weight, (stored, n_rows, n_cols))
        self.shape = shape
        self.weight = weight
        self.rows = rows
        self.cols = cols
        self._slots = check_slots("slots", slots, shape.members, stored)

    @property
    def slots(self) -> SlotMap:
        """The stored slot of each member, None where the term is absent."""
        return self._slots

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: weight, and rows and cols if there are any."""
        return _named(weight=self.weight, rows=self.rows, cols=self.cols)

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {"slots": list(self._slots), "storage": "plain"}

    @classmethod
    def build(
        cls,
        shape: BankShape,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **own: Any,
    ) -> Self:
        """See `Term.build`; a kind of dense term adds arguments of its own."""
        return cls(
            shape,
            settings["slots"],
            tensors["weight"],
            rows=tensors.get("rows"),
            cols=tensors.get("cols"),
            **own,
        )

    def macs(self, member: int) -> int:
        """See `Term.macs`."""
        return self.weight.shape[1] * self.weight.shape[2] if self.has(member) else 0

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Term.materialise`."""
        slot = self._slots[member]
        if slot is None:
            return None, None
        size = (self.shape.out_features, self.shape.in_features)
        return place_block(self.weight[slot], self.rows, slot, self.cols, slot, size), None

    def apply(self, x: Tensor, member: int) -> Tensor:
        """See `Term.apply`."""
        self._check_input(x)
        slot = self._slots[member]
        if slot is None:
            return self._no_output(x)
        part = F.linear(take_columns(x, self.cols, slot), self.weight[slot])
        return place_rows(part, self.rows, slot, self.shape.out_features)


class Bias(Term):
    """A constant output per slot: a layer's biases, or an expert replaced by its mean output.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        vector: ``[S, out]``, or ``[S, R]`` with rows.
        rows: Output rows, ``[R]`` or ``[S, R]``.
    """

    kind: ClassVar[str] = "bias"
    plain: ClassVar[tuple[str, ...]] = ("vector",)

    def __init__(
        self,
        shape: BankShape,
        slots: Sequence[int | None],
        vector: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        stored = vector.shape[0] if vector.dim() else 0
        n_rows = shape.out_features
        if rows is not None:
            n_rows = check_index("rows", rows, stored, shape.out_features)
        check_float("vector", vector, (stored, n_rows))
        self.shape = shape
        self.vector = vector
        self.rows = rows
        self._slots = check_slots("slots", slots, shape.members, stored)

    @property
    def slots(self) -> SlotMap:
        """The stored slot of each member, None where the term is absent."""
        return self._slots

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: vector, and rows if there are any."""
        return _named(vector=self.vector, rows=self.rows)

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {"slots": list(self._slots), "storage": "plain"}

    @classmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Bias:
        """See `Term.build`."""
        return cls(shape, settings["slots"], tensors["vector"], rows=tensors.get("rows"))

    def macs(self, member: int) -> int:
        """See `Term.macs`: adding a constant multiplies nothing."""
        return 0

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Term.materialise`."""
        slot = self._slots[member]
        if slot is None:
            return None, None
        vector = self.vector[slot].unsqueeze(0)
        return None, place_rows(vector, self.rows, slot, self.shape.out_features).squeeze(0)

    def apply(self, x: Tensor, member: int) -> Tensor:
        """See `Term.apply`."""
        self._check_input(x)
        slot = self._slots[member]
        if slot is None:
            return self._no_output(x)
        # Copied, so that a caller may add to the result in place.
        part = self.vector[slot].repeat(x.shape[0], 1)
        return place_rows(part, self.rows, slot, self.shape.out_features)


def _named(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
