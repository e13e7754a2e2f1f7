"""Plans the rows that are missing, and finds which of them are budgeted in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UserError
from ..evaluate.loading import resolve_device
from ..plan import Plan, make_plan
from .rows import asked_row

if TYPE_CHECKING:
    from ..engine import Reporter
    from .run import Session, Slot

PLAIN = 0.02  # how far a row's bytes may be from its elements' for its budget to count elements


def plan_rows(session: Session, reporter: Reporter) -> Plan:
    """Plans the rows that are missing; those that cannot be are refused.

    Returns:
        Some row's plan: model, texts and device are the same for all.

    Raises:
        UserError: No row can be planned: most likely the model is to blame, or the text.
    """
    device = resolve_device(session.loaded.rows[0].recipe.device)
    some: Plan | None = None
    errors: list[UserError] = []
    for slot in session.pending:
        try:
            plan = _plan_row(session, slot, device, some)
        except UserError as error:
            errors.append(error)
            slot.row = asked_row(slot.spec, slot.key, "refused", str(error))
            reporter.step(f"{slot.key}: refused: {error}")
            continue
        some = some or plan
        reporter.step(slot.key)
    finished = [slot for slot in session.slots if slot.row and slot.row.status == "ok"]
    if some is None and finished:
        some = make_plan(finished[0].spec.recipe, session.registry, device)
    if some is None:
        raise errors[0]
    return some


def _plan_row(session: Session, slot: Slot, device: str, other: Plan | None) -> Plan:
    model = other.model if other is not None else None
    plan = make_plan(slot.spec.recipe, session.registry, device, model)
    if session.undecided(slot.spec):
        in_bytes = not _plain(plan)
        session.decide(slot, in_bytes)
        if in_bytes:
            plan = make_plan(slot.spec.recipe, session.registry, device, plan.model)
    return plan


def _plain(plan: Plan) -> bool:
    """Whether a row stores its elements whole, one after the other, and next to nothing else.

    Packed and sparse terms do not; where data decide the terms they are taken for plain.
    """
    chosen = {curve.item: curve.settings[0] for curve in plan.curves}
    changed = plan.layout(plan.sizes(chosen)) if not plan.pending else None
    for layer, banks in (changed or {}).items():
        for name, terms in banks.items():
            width = plan.storage_dtype(layer, plan.sites[layer][name]).itemsize
            elements = sum(term.parameters() for term in terms) * width
            if abs(sum(term.nbytes() for term in terms) - elements) > PLAIN * elements:
                return False
    return True
