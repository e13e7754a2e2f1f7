"""What a result stores beside its budget's scope; which sizes are upper bounds, which far below.

What is stored follows from the terms; what a token passes through may wait for data: whom a policy
skips at run time, and which experts share a slot. A plan without data skips nobody and divides the
experts evenly; a token then meets most, for the expected number of different groups that k experts
belong to is largest where all groups are of one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.source import FLOATING
from ..terms import ExpertSkip, Term
from .budget import TOLERANCE, group_rule
from .layout import MetaTerms
from .removal import layer_shares, routers, uniform

if TYPE_CHECKING:
    from .plan import Plan

UNEVEN = 0.15  # how far shares that should be equal may be apart without a word
PER_TOKEN = ("active_parameters", "macs_per_token")  # of `ModelSizes`


def beside(plan: Plan, left: Mapping[int, int]) -> int:
    """What a result stores beside the budget's scope, in the budget's unit.

    Args:
        plan: The plan.
        left: How many experts each layer keeps, of the layers that lose some.
    """
    gone = set(plan.left_out(uniform(plan, left)))
    unread = sum(_cost(plan, n) for n in plan.unread.names if n not in gone)
    return plan.outside + unread - router_rows(plan, left)


def router_rows(plan: Plan, left: Mapping[int, int]) -> int:
    """What goes of routers with removed experts, beside the budget's scope and in its unit.

    Router rows are no experts and no targets: where the scope is not the whole model they save
    nothing of it.

    Args:
        plan: The plan.
        left: How many experts each layer keeps, of the layers that lose some.
    """
    assert plan.recipe.budget is not None
    if not left or plan.recipe.budget.of == "model":
        return 0
    return sum(
        _cost(plan, name)
        * (router.experts - left.get(layer, router.experts))
        // plan.source.tensors[name].shape[share.dim]
        for layer, router in routers(plan).items()
        for name, share in layer_shares(plan, layer, router).items()
        if share.dim is not None and not share.of_experts
    )


def _cost(plan: Plan, name: str) -> int:
    """What a source tensor counts, in the budget's unit."""
    info = plan.source.tensors[name]
    if plan.recipe.budget is not None and plan.recipe.budget.unit == "bytes":
        return info.nbytes
    return info.numel * (info.dtype in FLOATING)


def at_most(changed: MetaTerms) -> list[str]:
    """The names of the sizes that calibration may turn out smaller.

    Args:
        changed: The terms of every changed module, as `Plan.layout` gives them.
    """
    terms = (term for banks in changed.values() for bank in banks.values() for term in bank)
    return list(PER_TOKEN) if any(map(_data_decide, terms)) else []


def _data_decide(term: Term) -> bool:
    """Whether data tell what a token meets of a term: whom it skips, or which experts share."""
    if isinstance(term, ExpertSkip):
        return not term.ratios
    return any(map(_in_groups, term.slot_maps().values()))


def _in_groups(slots: Sequence[int | None]) -> bool:
    """Whether some members share a slot and others another."""
    used = [slot for slot in slots if slot is not None]
    return 1 < len(set(used)) < len(used)


def uneven_warning(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A warning where an allocator that trades nothing leaves banks far from equal shares.

    Args:
        plan: The plan.
        rows: Layers and banks, as `describe` lists them.
    """
    allocate = plan.recipe.allocate
    if allocate is None or allocate.method.needs_curves:
        return []
    auto = {
        (layer, bank)
        for number, step in enumerate(plan.recipe.steps)
        if step.auto
        for layer, banks in plan.targets[number].items()
        for bank in banks
    }
    shares = {
        f"{row['bank']} of layer {row['layer']}": row["parameters"] / row["original_parameters"]
        for row in rows
        if (row["layer"], row["bank"]) in auto and row["parameters"] is not None
    }
    if not shares or max(shares.values()) - min(shares.values()) <= UNEVEN:
        return []
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    return [
        f"shares are uneven: {least} keeps {shares[least]:.1%} of its parameters, {most} "
        f"{shares[most]:.1%}; the steps' sizes (multiples of a rank, whole experts) are coarse for "
        "matrices of this size, and what one bank leaves of the budget others take"
    ]


def coarse_warning(plan: Plan, attained: int) -> list[str]:
    """A warning where less is stored than the budget allows, by more than its tolerance.

    Args:
        plan: The plan.
        attained: What the budget's scope stores, planned or measured.
    """
    assert plan.allowed is not None  # there is a budget
    short = (plan.allowed - attained) / plan.scope
    if short <= TOLERANCE or plan.reachable is not None:
        return []  # or the plan has said that its steps do not use the budget up
    return [
        f"{short:.2%} of the original less than the budget allows is stored: the steps' sizes are "
        f"too coarse{group_rule(plan)}"
    ]
