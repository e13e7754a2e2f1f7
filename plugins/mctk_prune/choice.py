"""Which experts of a layer may go, in what numbers, and any that may: what plans need to know."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from mctk.decompose import present_groups
from mctk.errors import UserError
from mctk.hookspecs import MethodOptions
from mctk.notes import note
from pydantic import Field, field_validator

if TYPE_CHECKING:
    from mctk.hookspecs import Layer
    from mctk.terms import Bank
    from torch import Tensor


class ChoiceOptions(MethodOptions):
    """Options of every method that chooses among experts."""

    protect: dict[int, list[int]] = Field(
        default={},
        json_schema_extra={"keys": "layers"},
        description="experts that stay whatever their score, by layer: {0: [3, 17]} (both counted "
        "from 0), such as those that were found to matter beyond all others",
    )

    @field_validator("protect")
    @classmethod
    def _counted(cls, value: dict[int, list[int]]) -> dict[int, list[int]]:
        for layer, experts in value.items():
            if layer < 0 or any(expert < 0 for expert in experts):
                raise ValueError("layers and experts are counted from 0")
        return {layer: sorted(set(experts)) for layer, experts in value.items()}


def present(banks: Layer) -> list[int]:
    """The experts that earlier steps have left in a layer, ascending."""
    return [expert for group in present_groups(banks) for expert in group]


def counts(banks: Layer, options: ChoiceOptions, groups: int, name: str) -> list[int]:
    """How many experts may stay in a layer, below those that there are, ascending.

    Of a router that chooses among groups, as many in each group and two at least.

    Args:
        banks: The layer's banks.
        options: The method's.
        groups: The router's.
        name: The method, for messages.

    Raises:
        UserError: The experts do not all store the same: their number would not say what is stored;
            or a protected one does not exist.
    """
    found = present(banks)
    for bank in banks.values():
        _check_alike(bank, found, name)
    least = max(2 if groups > 1 else 1, _most_protected(banks, options, groups))
    return list(range(least * groups, len(found), groups))


def check_count(banks: Layer, keep: int, possible: list[int], name: str) -> None:
    """Checks a stated number of experts.

    Args:
        banks: The layer's banks.
        keep: How many are to stay.
        possible: What `counts` gives.
        name: The method, for messages.

    Raises:
        UserError: So many cannot stay.
    """
    found = present(banks)
    if keep in possible or keep == len(found):
        return
    what = f"only all {len(found)} can"
    if possible:
        step = possible[1] - possible[0] if len(possible) > 1 else 1
        every = f" in steps of {step}" if step > 1 else ""
        what = f"{possible[0]} to {possible[-1]}{every} can"
    raise UserError(
        f"{name}: {keep} of the experts of layer {_any(banks).layer} cannot stay; {what}"
    )


def protected(banks: Layer, options: ChoiceOptions) -> list[int]:
    """The protected experts of a layer, ascending.

    Raises:
        UserError: There is no such expert.
    """
    bank = _any(banks)
    found = options.protect.get(bank.layer, [])
    for expert in found:
        if expert >= bank.shape.members:
            raise UserError(
                f"options.protect: layer {bank.layer} has experts 0 to {bank.shape.members - 1}, "
                f"there is no {expert}"
            )
    return found


def choose(
    banks: Layer, scores: Tensor, keep: int, groups: int, options: ChoiceOptions
) -> list[int]:
    """The experts that stay, ascending: the protected ones, and those of the highest scores."""
    from mctk_prune.math import best

    return best(favour(scores, protected(banks, options)), keep, groups, present(banks))


def favour(scores: Tensor, experts: Iterable[int]) -> Tensor:
    """The scores [E], some experts' above all others'."""
    found = scores.clone()
    for expert in experts:
        found[expert] = float("inf")
    return found


def cost_of_one(banks: Layer) -> int:
    """Parameters that one expert stores in a layer's banks, any of those present."""
    from mctk.terms import drop_members

    last = present(banks)[-1:]
    if len(present(banks)) < 2:
        return 0
    return sum(
        bank.parameters() - sum(term.parameters() for term in drop_members(bank, last))
        for bank in banks.values()
    )


def _any(banks: Layer) -> Bank:
    return next(iter(banks.values()))


def _most_protected(banks: Layer, options: ChoiceOptions, groups: int) -> int:
    """The most protected experts that a group of any layer has: all layers keep as many."""
    protected(banks, options)  # this layer's exist
    size = _any(banks).shape.members // groups
    most = 0
    for experts in options.protect.values():
        own = [expert // size for expert in experts]
        most = max([most, *(own.count(group) for group in own)])
    return most


def _check_alike(bank: Bank, experts: list[int], name: str) -> None:
    """Checks that each expert has a slot of its own in a term, or the one that all share.

    Raises:
        UserError: Some experts share what others do not.
    """
    for term in bank.terms:
        for slots in term.slot_maps().values():
            different = {slots[expert] for expert in experts}
            own = len(different) == len(experts) and None not in different
            if len(different) > 1 and not own:
                raise UserError(
                    f"{name}: the experts of {bank.name} in layer {bank.layer} do not store the "
                    "same amount each (some were merged or replaced): put this step before that one"
                )


def tell_ties(
    banks: Layer,
    scores: Tensor,
    kept: Collection[int],
    groups: int,
    options: ChoiceOptions,
) -> None:
    """Notes where a score decided nothing: equal ones on both sides of the cut.

    Args:
        banks: As in `choose`.
        scores: [E].
        kept: The experts that stay.
        groups: As in `choose`.
        options: Whose protected experts stay whatever their score.
    """
    size = scores.numel() // groups
    safe = set(protected(banks, options))
    open_ = [expert for expert in present(banks) if expert not in safe]
    stay: list[int] = []
    go: list[int] = []
    for start in range(0, scores.numel(), size):
        run = [expert for expert in open_ if start <= expert < start + size]
        last = [float(scores[expert]) for expert in run if expert in kept]
        first = [float(scores[expert]) for expert in run if expert not in kept]
        if last and first and min(last) == max(first):
            equal = [expert for expert in run if float(scores[expert]) == min(last)]
            stay += [expert for expert in equal if expert in kept]
            go += [expert for expert in equal if expert not in kept]
    if go:
        why = " (without a token: more calibration text would tell)" if scores[go[0]] == 0 else ""
        note(
            f"the score decided nothing between experts {', '.join(map(str, go))}, which go, and "
            f"{', '.join(map(str, stay))}, which stay by their numbers: theirs are equal{why}"
        )
