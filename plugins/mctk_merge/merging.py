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

from mctk.decompose import own_matrices, part_of
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, Dense, Term
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
        import torch

        experts = _experts(banks)
        count = _count(banks, size)
        if count == experts:
            return {}
        slots = [e * count // experts for e in range(experts)]
        return {
            name: [
                _with_slots(term, slots, torch.empty(count, *_stack(term).shape[1:], device="meta"))
                for term in bank.terms
            ]
            for name, bank in banks.items()
        }

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
        slot_of = {e: slot for slot, group in enumerate(groups) for e in group}
        slots = [slot_of[e] for e in range(experts)]
        return {
            name: [
                _with_slots(term, slots, average(_ordered(term, name, order), groups, scale))
                for term in bank.terms
            ]
            for name, bank in layer.items()
        }


def average(stack: Tensor, groups: Sequence[Sequence[int]], scale: Sequence[float]) -> Tensor:
    """Returns the weighted mean of each group, ``[E, ...]`` → ``[n, ...]`` float32.

    ``Σ_e a_e W_e / Σ_e a_e``; where no member has any weight, because calibration never used the
    group, the mean. A group of one is its member, bit for bit. Sums run in float64.

    Args:
        stack: The experts' matrices or biases.
        groups: The members of each group.
        scale: ``a``, not negative.
    """
    import torch

    result = torch.empty(len(groups), *stack.shape[1:], device=stack.device)
    for slot, group in enumerate(groups):
        share = [scale[e] for e in group]
        if not any(share):
            share = [1.0] * len(group)
        if len(group) == 1:
            result[slot] = stack[group[0]]
            continue
        total = torch.zeros_like(stack[0], dtype=torch.float64)
        for e, a in zip(group, share, strict=True):
            total.add_(stack[e].double(), alpha=float(a))
        result[slot] = total / float(sum(share))
    return result


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
    weights = {part_of(name): _matrices(bank).weight for name, bank in layer.items()}
    return orders(weights, groups, anchors)


def _ordered(term: Term, name: str, order: Tensor | None) -> Tensor:
    """The experts' matrices or biases of a term, their neurons in a new order."""
    from mctk.linalg import reorder
    from mctk.terms import Bias

    stack = _stack(term)
    if order is None or not isinstance(term, Bias):
        return reorder(stack, part_of(name), order)
    if part_of(name) == "down":
        return stack  # down's biases belong to hidden channels
    return stack.gather(1, order.to(stack.device))


def _stack(term: Term) -> Tensor:
    """What a term stores for its slots: matrices ``[E, out, in]``, or biases ``[E, out]``."""
    from mctk.terms import Bias, Dense

    assert isinstance(term, Dense | Bias)
    return term.vector if isinstance(term, Bias) else term.weight


def _with_slots(term: Term, slots: Sequence[int], stack: Tensor) -> Term:
    from mctk.terms import Bias, Dense

    return (Bias if isinstance(term, Bias) else Dense)(term.shape, slots, stack)


def _matrices(bank: Bank) -> Dense:
    """The term with the experts' own matrices.

    Raises:
        UserError: A step before has rewritten or packed them or their biases.
    """
    from mctk.terms import Bias, Dense

    found = own_matrices(bank)
    plain = all(
        type(term) in (Dense, Bias)
        and set(term.tensors()) <= {"weight", "vector"}
        and term.slots == found.slots
        and _stack(term).shape[0] == bank.shape.members
        for term in bank.terms
    )
    if not plain:
        raise UserError(
            f"{bank.name} of layer {bank.layer} was rewritten by a step before: merge comes first"
        )
    return found


def _experts(banks: Mapping[str, Bank]) -> int:
    """The number of experts, after checking that the banks are whole experts as they were read.

    Raises:
        UserError: They are not; the message says what to do.
    """
    first = next(iter(banks.values()))
    experts = first.shape.members
    for bank in banks.values():
        _matrices(bank)
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
