"""Plans the rows that are missing, and finds which of them are budgeted in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import UserError
from ..evaluate.loading import resolve_device
from ..planning import Plan, make_plan
from .rows import asked_row

if TYPE_CHECKING:
    from ..engine import Reporter
    from ..registry import Registry
    from .file import LoadedComparison, RowSpec
    from .result import Budget
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


@dataclass(frozen=True)
class Preview:
    """What a row would be, from config.json and headers.

    Attributes:
        name: Of the row.
        budget: What it is asked; None if its steps say their sizes.
        seed: Of its calibration.
        refused: Whether the plan refuses it.
        original: The original's sizes by name.
        planned: The row's; None where data decide them.
        remarks: Why it is refused, or the plan's warnings.
    """

    name: str
    budget: Budget | None
    seed: int
    refused: bool = False
    original: dict[str, int] | None = None
    planned: dict[str, int] | None = None
    remarks: list[str] = field(default_factory=list)


def preview(loaded: LoadedComparison, registry: Registry) -> Iterator[Preview]:
    """Plans every row of a comparison, and writes nothing.

    Args:
        loaded: The comparison.
        registry: The plugins.

    Raises:
        UserError: The device is not there.
    """
    device = resolve_device(loaded.rows[0].recipe.device)
    other: Plan | None = None
    for spec in loaded.rows:
        try:
            spec, plan = _plan_spec(loaded, spec, registry, device, other, weights=False)
            waits = plan.pending or plan.needs_curves
            sizes = None if waits else plan.predict(plan.solve())
        except UserError as error:
            remarks = [f"refused: {error}"]
            yield Preview(spec.name, spec.budget, spec.seed, refused=True, remarks=remarks)
            continue
        other = other or plan
        original, planned = plan.original.as_dict(), sizes.as_dict() if sizes else None
        yield Preview(
            spec.name, spec.budget, spec.seed, False, original, planned, list(plan.warnings)
        )


def _plan_row(session: Session, slot: Slot, device: str, other: Plan | None) -> Plan:
    asked = slot.spec
    spec, plan = _plan_spec(session.loaded, asked, session.registry, device, other)
    if asked.undecided:
        session.decide(slot, spec is not asked)
    return plan


def _plan_spec(
    loaded: LoadedComparison,
    spec: RowSpec,
    registry: Registry,
    device: str,
    other: Plan | None,
    weights: bool = True,
) -> tuple[RowSpec, Plan]:
    """A row's plan, and the row as it came to be: one whose bytes are not plain counts those."""
    plan = make_plan(spec.recipe, registry, device, other.model if other else None, weights)
    if spec.undecided and not _plain(plan):
        spec = loaded.in_bytes(spec)
        plan = make_plan(spec.recipe, registry, device, plan.model, weights)
    return spec, plan


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
