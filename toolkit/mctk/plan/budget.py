"""What a budget leaves for the banks whose sizes an allocator decides, and their size curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..terms import DENSE, Bias, SizeCurve, Term

if TYPE_CHECKING:
    from ..recipe import Step
    from .plan import Item, Plan


def set_budget(plan: Plan) -> None:
    """Works out what the auto banks may cost, and their curves."""
    recipe = plan.recipe
    auto = [
        (number, layer, bank)
        for number, step in enumerate(recipe.steps)
        if step.auto
        for layer, banks in plan.targets[number].items()
        for bank in banks
    ]
    if not auto:
        return
    budget = recipe.budget
    assert budget is not None  # the recipe refuses `size: auto` without one
    seen: set[Item] = set()
    for number, layer, bank in auto:
        if (layer, bank) in seen:
            raise recipe.error(
                ("steps", number), f"two steps with size: auto work on {bank} of layer {layer}"
            )
        seen.add((layer, bank))
    in_bytes = budget.unit == "bytes"

    def cost(terms: list[Term]) -> int:
        return sum(term.nbytes() if in_bytes else term.parameters() for term in terms)

    def weights_cost(layer: int, bank: str) -> int:
        terms = plan.original_terms(layer, plan.sites[layer][bank])
        return cost([term for term in terms if not isinstance(term, Bias)])

    fixed = dict.fromkeys(auto, DENSE)  # everything but the auto banks, whose weights come off
    explicit = {
        (number, layer, bank): plan.setting(step, layer, bank, {})
        for number, step in enumerate(recipe.steps)
        if not step.auto
        for layer, banks in plan.targets[number].items()
        for bank in banks
    }
    rest = plan.predict({**explicit, **fixed})
    if rest is None:
        raise recipe.error(
            ("budget",), "the sizes of the steps that are not size: auto depend on data"
        )
    total, result = plan.original.parameters, rest.parameters
    if in_bytes:
        total, result = plan.original.bytes, rest.bytes
    plan.scope = _scope(plan, total, cost)
    plan.allowed = math.floor(budget.kept * plan.scope + 1e-6)
    rest_in_scope = plan.scope - (total - result) - sum(weights_cost(la, b) for _, la, b in auto)
    plan.budget = plan.allowed - rest_in_scope
    for number, layer, bank in auto:
        plan.curves.append(_curve(plan, recipe.steps[number], layer, bank, in_bytes))
    smallest = sum(curve.cost[0] for curve in plan.curves)
    if plan.budget < smallest:
        least = (rest_in_scope + smallest) / plan.scope
        raise recipe.error(
            ("budget",),
            f"at most {1 - least:.1%} of the {budget.of} can be removed by these steps, "
            f"not {1 - budget.kept:.1%}",
        )
    if plan.needs_curves:
        _check_feasible(plan)


def _check_feasible(plan: Plan) -> None:
    """Lets the allocator refuse what it will refuse, before errors are measured.

    Any falling errors will do: whether a budget can be met depends on costs alone.
    """
    allocate = plan.recipe.allocate
    assert allocate is not None and plan.budget is not None
    stand_ins = [
        SizeCurve(c.item, c.settings, c.cost, tuple(float(c.cost[-1] - cost) for cost in c.cost))
        for c in plan.curves
    ]
    allocate.method.allocate(stand_ins, plan.budget, allocate.options)


def _scope(plan: Plan, total: int, cost: Callable[[list[Term]], int]) -> int:
    """What the budget's scope costs in the original."""
    assert plan.recipe.budget is not None
    of = plan.recipe.budget.of
    if of == "model":
        return total
    chosen = {
        (layer, name)
        for layer, sites in enumerate(plan.sites)
        for name, site in sites.items()
        if (
            name.startswith("experts.")
            if of == "experts"
            else any(name in step.get(layer, ()) for step in plan.targets)
        )
    }
    if not chosen:
        raise plan.recipe.error(("budget",), f"of: the model has no {of}")
    return sum(cost(plan.original_terms(layer, plan.sites[layer][name])) for layer, name in chosen)


def _curve(plan: Plan, step: Step, layer: int, bank: str, in_bytes: bool) -> SizeCurve:
    """The sizes that a bank may take, those that cost no less than the original left out."""
    site = plan.sites[layer][bank]
    settings, costs = step.method.sizes(site.shape, step.options)
    storage = plan.storage_dtype(layer, site)
    dense = site.shape.parameters
    if in_bytes:
        dense *= plan.source_dtype(layer, site).itemsize
    pairs: list[tuple[int, int]] = []
    for setting, parameters in zip(settings, costs, strict=True):
        if setting == DENSE:
            continue
        cost = parameters
        if in_bytes:
            terms = step.method.layout(site.shape, setting, step.options)
            cost = (
                parameters * storage.itemsize
                if terms is None
                else sum(term.to(dtype=storage).nbytes() for term in terms)
            )
        if cost < dense:
            pairs.append((setting, cost))
    pairs.append((DENSE, dense))
    return SizeCurve((layer, bank), tuple(s for s, _ in pairs), tuple(c for _, c in pairs))
