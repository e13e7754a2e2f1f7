"""Experts averaged over groups: the terms that store one expert for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mctk.decompose.merged import own_matrices, part_of
from mctk.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mctk.terms import Bank, Dense, Term


def whole_experts(bank: Bank) -> Dense:
    """Returns the term with the experts' own matrices, one each, nothing of them rewritten.

    Raises:
        UserError: A step before has rewritten or packed them or their biases.
    """
    from mctk.terms import Bias, Dense

    found = own_matrices(bank)
    plain = all(
        type(term) in (Dense, Bias)
        and set(term.stored()) == set(term.tensors()) <= {"weight", "vector"}  # not packed
        and term.slots == found.slots
        and _stack(term).shape[0] == bank.shape.members
        for term in bank.terms
    )
    if not plain:
        raise UserError(
            f"{bank.name} of layer {bank.layer} was rewritten by a step before: merge comes first"
        )
    return found


def averaged(
    bank: Bank,
    groups: Sequence[Sequence[int]],
    scale: Sequence[float] | Tensor,
    order: Tensor | None = None,
    shared: bool = True,
) -> list[Term]:
    """Returns the bank's terms with one slot a group: its members' weighted mean (`average`).

    Args:
        bank: Whole experts (`whole_experts`), their biases too; on meta for a layout.
        groups: The members of each group.
        scale: The experts' weights ``[E]``, not negative.
        order: Orders of neurons ``[E, I]`` that the experts are brought into first.
        shared: Whether a group's members all use its slot. If not, its first alone does, and the
            others are gone; so are experts of no group.
    """
    from mctk.terms import Bias, Dense

    slots: list[int | None] = [None] * bank.shape.members
    for slot, group in enumerate(groups):
        for e in group if shared else group[:1]:
            slots[e] = slot
    found: list[Term] = []
    for term in bank.terms:
        kind = Bias if isinstance(term, Bias) else Dense
        stack = average(_ordered(term, part_of(bank.name), order), groups, scale)
        found.append(kind(bank.shape, slots, stack))
    return found


def average(
    stack: Tensor, groups: Sequence[Sequence[int]], scale: Sequence[float] | Tensor
) -> Tensor:
    """Returns the weighted mean of each group, ``[E, ...]`` → ``[n, ...]`` float32.

    ``Σ_e a_e W_e / Σ_e a_e`` (M-SMoE's eq. 2, arXiv 2310.01334); where no member has any weight,
    because calibration never used the group, the mean. A group of one is its member, bit for bit.
    Sums run in float64.

    Args:
        stack: The experts' matrices or biases.
        groups: The members of each group.
        scale: ``a [E]``, not negative.
    """
    import torch

    result = torch.empty(len(groups), *stack.shape[1:], device=stack.device)
    for slot, group in enumerate(groups):
        share = [float(scale[e]) for e in group]
        if not any(share):
            share = [1.0] * len(group)
        if len(group) == 1:
            result[slot] = stack[group[0]]
            continue
        total = torch.zeros_like(stack[0], dtype=torch.float64)
        for e, a in zip(group, share, strict=True):
            total.add_(stack[e].double(), alpha=a)
        result[slot] = total / sum(share)
    return result


def _ordered(term: Term, part: str, order: Tensor | None) -> Tensor:
    """The experts' matrices or biases of a term, their neurons in a new order."""
    from mctk.linalg import reorder
    from mctk.terms import Bias

    stack = _stack(term)
    if order is None or not isinstance(term, Bias):
        return reorder(stack, part, order)
    if part == "down":
        return stack  # down's biases belong to hidden channels
    return stack.gather(1, order.to(stack.device))


def _stack(term: Term) -> Tensor:
    """What a term stores for its slots: matrices ``[E, out, in]``, or biases ``[E, out]``."""
    from mctk.terms import Bias, Dense

    assert isinstance(term, Dense | Bias)
    return term.vector if isinstance(term, Bias) else term.weight
