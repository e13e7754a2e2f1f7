"""What the merges share: how many groups, the average of each, and the terms that store it.

A merge replaces a bank's matrices by a `Dense` term with one slot for each group of experts; the
router keeps its rows. A token that is sent to several members of one group gets the group's output
with the sum of their routing weights, computed once.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mctk.decompose import averaged, part_of, whole_experts
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape
    from torch import Tensor


class GroupOptions(MethodOptions):
    """Options of every merge into groups."""

    weights: Literal["frequency", "mean"] = Field(
        default="frequency",
        description="how a group is averaged: frequency, every expert counts as often as the "
        "router chose it; mean, all count the same",
    )
    align: bool = Field(
        default=False,
        description="first bring each expert's intermediate neurons into the order of its group's "
        "most frequent expert",
    )


class GroupMerge(Method):
    """Base of the merges into groups; a subclass says which experts form them."""

    stage = "merge"
    scope = "experts"
    takes_size = True
    units = "score"
    Options = GroupOptions

    @abstractmethod
    def groups(
        self, layer: int, experts: int, statistics: Any, count: int, options: Any
    ) -> list[list[int]]:
        """Returns the members of each group, each ascending, ordered by first member.

        Args:
            layer: The layer's number.
            experts: E.
            statistics: The layer's statistics.
            count: How many groups, from 1 to E - 1.
            options: The method's options.
        """

    def needs(self, shape: BankShape, bank: str, options: Any) -> list[Need]:
        """Frequencies: for the average, and to know each group's anchor."""
        from mctk.statistics import ExpertFrequency

        return [ExpertFrequency()] if _reads_frequency(options) else []

    def sizes(self, banks: Layer, options: GroupOptions) -> tuple[list[int], list[int]]:
        """Numbers of groups below that of the experts, then DENSE."""
        from mctk.terms import DENSE

        experts = _experts(banks)
        one = sum(bank.parameters() for bank in banks.values()) // experts
        return [*range(1, experts), DENSE], [one * count for count in range(1, experts + 1)]

    def layout(self, banks: Layer, size: int | None, options: GroupOptions) -> Terms:
        """As many slots as groups; who is in which, data will tell."""
        experts = _experts(banks)
        count = _count(banks, size)
        if count == experts:
            return {}
        # As even as can be: under no other grouping does a token pass through more.
        groups = [list(range(group, experts, count)) for group in range(count)]
        return {name: averaged(bank, groups, [1] * experts) for name, bank in banks.items()}

    def merge(
        self, layer: Layer, statistics: Any, size: int | None, options: GroupOptions
    ) -> Terms:
        """Replaces every bank's matrices and biases by the averages of the groups."""
        from mctk.statistics import ExpertFrequency

        experts, count = _experts(layer), _count(layer, size)
        if count == experts:
            return {}
        number = next(iter(layer.values())).layer
        groups = self.groups(number, experts, statistics, count, options)
        note(_described(groups))
        even = [1] * experts
        frequency = statistics[ExpertFrequency()].tolist() if _reads_frequency(options) else even
        scale = frequency if options.weights == "frequency" else even
        order = _orders(layer, groups, frequency) if options.align else None
        return {name: averaged(bank, groups, scale, order) for name, bank in layer.items()}


def seed_of(layer: int, seed: int) -> int:
    """Returns a seed of its own for each layer."""
    return zlib.crc32(f"{seed}/{layer}".encode())


def _described(groups: Sequence[Sequence[int]]) -> str:
    """The groups of several experts, as in ``5 groups: 0+3, 2+4+7; 3 alone``."""
    several = ["+".join(map(str, group)) for group in groups if len(group) > 1]
    alone = len(groups) - len(several)
    return f"{len(groups)} groups: {', '.join(several)}" + (f"; {alone} alone" if alone else "")


def _reads_frequency(options: GroupOptions) -> bool:
    return options.weights == "frequency" or options.align


def _orders(layer: Layer, groups: Sequence[Sequence[int]], frequency: Sequence[int]) -> Tensor:
    """The order ``[E, I]`` that brings neurons to those of the group's most frequent expert."""
    from mctk.linalg import orders

    anchors = [max(group, key=lambda e: (frequency[e], -e)) for group in groups]
    weights = {part_of(name): whole_experts(bank).weight for name, bank in layer.items()}
    return orders(weights, groups, anchors)


def _experts(banks: Mapping[str, Bank]) -> int:
    """The number of experts, after checking that the banks are whole experts as they were read.

    Raises:
        UserError: They are not; the message says what to do.
    """
    first = next(iter(banks.values()))
    experts = first.shape.members
    for bank in banks.values():
        whole_experts(bank)
        if bank.shape.members != experts:
            raise UserError(
                f"{bank.name} of layer {bank.layer} has {bank.shape.members} members, {first.name} "
                f"{experts}: merge the banks of one group of experts at a time"
            )
    if experts < 2:
        raise UserError(f"{first.name} of layer {first.layer} has one member: merge needs two")
    return experts


def _count(banks: Mapping[str, Bank], size: int | None) -> int:
    """The number of groups that a size stands for; E for DENSE.

    Raises:
        UserError: There are not so many experts.
    """
    from mctk.terms import DENSE

    first = next(iter(banks.values()))
    experts = first.shape.members
    if size is None or size == DENSE:
        return experts
    if not 1 <= size <= experts:
        raise UserError(
            f"size: {size} groups in layer {first.layer}, whose {experts} experts allow 1 to "
            f"{experts}"
        )
    return size
