"""Which of a plan's sizes are upper bounds although the terms are known, and which are far below.

What is stored follows from the terms; what a token passes through may wait for data: whom a policy
skips at run time, and which experts share a slot. A plan without data skips nobody and divides the
experts evenly; a token then meets most, for the expected number of different groups that k experts
belong to is largest where all groups are of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..terms import ExpertSkip, Term
from .budget import TOLERANCE, group_rule
from .layout import MetaTerms

if TYPE_CHECKING:
    from .plan import Plan

PER_TOKEN = ("active_parameters", "macs_per_token")  # of `ModelSizes`


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


def coarse_warning(plan: Plan, attained: int) -> list[str]:
    """A warning where less is stored than the budget allows, by more than its tolerance.

    Args:
        plan: The plan.
        attained: What the budget's scope stores, planned or measured.
    """
    assert plan.allowed is not None  # there is a budget
    short = (plan.allowed - attained) / plan.scope
    if short <= TOLERANCE:
        return []
    return [
        f"{short:.2%} of the original less than the budget allows is stored: the steps' sizes are "
        f"too coarse{group_rule(plan)}"
    ]
