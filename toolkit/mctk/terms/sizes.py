"""Size curves: what each setting of a bank costs and loses. The currency of allocation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mctk.terms.shape import BankShape

DENSE = -1
"""The setting that leaves a matrix as it is."""

# Pivot positions are stored as int32.
_PIVOT_BYTES = 4


@dataclass(frozen=True)
class SizeCurve:
    """The settings of one bank, from the smallest to the largest.

    Attributes:
        item: (step, layer, bank); the banks joined by "+" where one call takes several.
        settings: Ranks, or what a method counts; the last may be `DENSE`, 'kept dense'.
        cost: Stored parameters (or bytes) of the bank at each setting, strictly increasing.
        error: Expected squared error at each setting, in the same unit in all curves, not
            increasing; None where no data was seen.
        raw: The same as the method itself gives it, such as squared output errors summed over all
            calibration tokens; None where that is not known.
    """

    item: tuple[int, int, str]
    settings: tuple[int, ...]
    cost: tuple[int, ...]
    error: tuple[float, ...] | None = None
    raw: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        place = f"size curve of {self.item[2]} in layer {self.item[1]}"
        if not self.settings or len(self.settings) != len(self.cost):
            raise ValueError(f"{place}: {len(self.settings)} settings and {len(self.cost)} costs")
        if DENSE in self.settings[:-1]:
            raise ValueError(f"{place}: only the last setting may be dense")
        if any(low >= high for low, high in pairwise(self.cost)):
            raise ValueError(f"{place}: costs must increase strictly")
        if self.error is None:
            return
        if len(self.error) != len(self.cost):
            raise ValueError(f"{place}: {len(self.cost)} costs and {len(self.error)} errors")
        if not all(0.0 <= value < float("inf") for value in self.error):
            raise ValueError(f"{place}: errors must be finite and not negative")
        if any(low < high for low, high in pairwise(self.error)):
            raise ValueError(f"{place}: errors must not increase")


def rank_settings(
    shape: BankShape,
    u_slots: int,
    v_slots: int,
    multiple: int,
    storage: str,
    element_bytes: int | None = None,
    beyond: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ranks worth having for a low-rank bank, and what each costs.

    All multiples up to ``min(out, in)`` that cost less than the dense bank, then `DENSE`. In
    plain storage they end at the break-even ``out·in / (out + in)``, in pivoted storage every
    rank below the full one is smaller than dense.

    Args:
        shape: The bank; dense means a matrix for each of its members.
        u_slots: Slots of U.
        v_slots: Slots of V.
        multiple: Ranks are multiples of it.
        storage: ``"plain"`` or ``"pivoted"`` (the identity in the factor with fewer slots).
        element_bytes: Bytes of a weight, for costs in bytes (pivot positions counted); None for
            costs in parameters.
        beyond: Also the ranks that cost no less than dense: a plan in bytes may want them where
            terms are stored in fewer bytes than the original.

    Returns:
        Settings, ascending with `DENSE` last, and the stored parameters or bytes of each.
    """
    if storage not in ("plain", "pivoted"):
        raise ValueError(f"storage must be 'plain' or 'pivoted', not {storage!r}")
    if multiple < 1:
        raise ValueError(f"multiple must be positive, not {multiple}")
    dense = shape.parameters * (1 if element_bytes is None else element_bytes)
    settings: list[int] = []
    costs: list[int] = []
    for rank in range(multiple, min(shape.out_features, shape.in_features) + 1, multiple):
        cost = rank * (u_slots * shape.out_features + v_slots * shape.in_features)
        pivoted = min(u_slots, v_slots) if storage == "pivoted" else 0
        cost -= pivoted * rank * rank
        if element_bytes is not None:
            cost = cost * element_bytes + pivoted * rank * _PIVOT_BYTES
        if (cost >= dense and not beyond) or (costs and cost <= costs[-1]):
            break
        settings.append(rank)
        costs.append(cost)
    return (*settings, DENSE), (*costs, dense)
