"""A full matrix of which each forward leaves out some channels, chosen by its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mctk.terms.dense import Dense
from mctk.terms.indices import check_float, check_same_dtype, of_slot, place_rows, take_columns
from mctk.terms.shape import BankShape

AXES = ("rows", "cols")

# A smaller product first copies the channels that stay. That pays once the multiplications it
# saves are this many for each element that is copied.
_WORTH = 16


class DynamicDense(Dense):
    """A shared base of which ``drop`` intermediate channels are skipped in each forward.

    The dynamic half of D²-MoE's semi-dynamic pruning (arXiv 2502.17298, section 3.4). The base of
    down has the channels as its columns (``axis="cols"``) and carries their energy; the bases of
    gate and up have them as rows and follow down's choice. Which ones are skipped is the run
    time's choice (`mctk.runtime.dynamic`); the term by itself, as in `apply` and `materialise`,
    is the whole stored matrix. All of it is stored and counts so; only `macs` sees the skipping.

    Args:
        shape: The bank's shape.
        slots: For each member its slot, or None.
        weight: ``[S, out, in]``, or ``[S, R, C]`` with rows and columns.
        rows: Output rows, ``[R]`` or ``[S, R]``.
        cols: Input columns, ``[C]`` or ``[S, C]``.
        drop: Channels that a forward skips, fewer than are stored.
        axis: "rows" or "cols": where the channels are.
        energy: For "cols": ``[S, C]``, not negative. Energy of each column's output on the
            calibration data: the mean over the tokens that visit a member of the slot of
            ``(Σ_e g_e h_ej)² · ‖W_b[:, j]‖²``, h the activated values and g the routing weights
            of those members (the square of equation 9). Only its proportions within a slot
            matter, so it may be scaled. It is frozen: no forward changes it.
    """

    kind: ClassVar[str] = "dynamic"
    plain: ClassVar[tuple[str, ...]] = ("energy",)

    def __init__(
        self,
        shape: BankShape,
        slots: Sequence[int | None],
        weight: Tensor,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        *,
        drop: int,
        axis: str,
        energy: Tensor | None = None,
    ) -> None:
        super().__init__(shape, slots, weight, rows, cols)
        if axis not in AXES:
            raise ValueError(f"axis: must be 'rows' or 'cols', not {axis!r}")
        channels = weight.shape[1 + AXES.index(axis)]
        if isinstance(drop, bool) or not isinstance(drop, int):
            raise ValueError(f"drop: must be an integer, not {drop!r}")
        if not 0 <= drop < channels:
            raise ValueError(f"drop: is {drop}, must lie in 0..{channels - 1}")
        if (energy is None) != (axis == "rows"):
            raise ValueError("energy: belongs to axis 'cols', and is needed there")
        if energy is not None:
            check_float("energy", energy, (weight.shape[0], channels))
            check_same_dtype({"weight": weight, "energy": energy})
            if not energy.is_meta and not bool(((energy >= 0) & torch.isfinite(energy)).all()):
                raise ValueError("energy: must be finite and not negative")
        self.drop = drop
        self.axis = axis
        self.energy = energy

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: those of `Dense`, and energy for axis "cols"."""
        return {**super().tensors(), **({} if self.energy is None else {"energy": self.energy})}

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {**super().settings(), "drop": self.drop, "axis": self.axis}

    @classmethod
    def build(
        cls,
        shape: BankShape,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **own: Any,
    ) -> Self:
        """See `Term.build`."""
        mine = {"drop": settings["drop"], "axis": settings["axis"], "energy": tensors.get("energy")}
        return super().build(shape, settings, tensors, **mine, **own)

    def macs(self, member: int) -> int:
        """See `Term.macs`; skipped channels cost nothing."""
        if not self.has(member):
            return 0
        _, rows, cols = self.weight.shape
        return (rows - self.drop) * cols if self.axis == "rows" else rows * (cols - self.drop)

    def without(self, x: Tensor, member: int, dropped: Tensor) -> Tensor:
        """Returns the output ``[T, out]`` as if the weights of some channels were zero.

        Args:
            x: Inputs, ``[T, in]``.
            member: One that has the term.
            dropped: Which channels are skipped, ``[out]`` or ``[in]`` bool by the axis.
        """
        self._check_input(x)
        slot = self.slots[member]
        assert slot is not None
        index = self.rows if self.axis == "rows" else self.cols
        dim = AXES.index(self.axis)
        weight = self.weight[slot]
        if x.shape[0] * self.drop < _WORTH * weight.shape[dim]:
            if self.axis == "cols":
                return self.apply(x.masked_fill(dropped, 0), member)
            return self.apply(x, member).masked_fill(dropped, 0)
        stays = ~dropped if index is None else ~dropped[of_slot(index, slot)]
        kept = stays.nonzero()[:, 0]
        weight = weight.index_select(dim, kept)
        # Positions among the bank's rows or columns, for all slots alike.
        places = kept if index is None else of_slot(index, slot)[kept]
        if self.axis == "cols":
            part = F.linear(take_columns(x, places, slot), weight)
            return place_rows(part, self.rows, slot, self.shape.out_features)
        part = F.linear(take_columns(x, self.cols, slot), weight)
        return place_rows(part, places, slot, self.shape.out_features)
