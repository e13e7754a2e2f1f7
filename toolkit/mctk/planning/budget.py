"""What a budget leaves for the banks whose sizes an allocator decides, and their size curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..registry import calling
from ..terms import DENSE, Bank, SizeCurve, Term
from .layout import DataDecide, MetaTerms, apply_layout, banks_now, groups, lay_out_layer
from .quantised import stored_share
from .removal import too_small

TOLERANCE = 0.005  # of the original: how far below its budget a run may end

if TYPE_CHECKING:
    from .plan import Plan, Size


def set_budget(plan: Plan) -> None:
    """Works out what the auto items may cost, and their curves.

    Where data decide what the prepared steps make, both wait until those have been run
    (`Plan.settle`); scope and allowance are known at once.

    Raises:
        RecipeError: The budget cannot be met, or data decide what cannot wait for them.
    """
    recipe = plan.recipe
    auto = [n for n, step in enumerate(recipe.steps) if step.auto]
    if not auto:
        return
    budget = recipe.budget
    assert budget is not None  # the recipe refuses `size: auto` without one
    _check_overlap(plan, auto)
    in_bytes = budget.unit == "bytes"

    def cost(terms: list[Term]) -> int:
        return sum(term.nbytes() if in_bytes else term.parameters() for term in terms)

    plan.scope, dequantised = _scope(plan, cost)
    plan.outside = (plan.plain.bytes if in_bytes else plan.plain.parameters) - dequantised
    plan.allowed = math.floor(budget.kept * plan.scope + 1e-6)
    plan.share = _even_share(plan)
    try:
        # Everything as it is with the auto steps left out; what they would rewrite comes off.
        fixed = plan.sizes()
        changed = plan.layout(fixed)
        if changed is None:
            raise DataDecide
        rest = plan.in_scope(changed)
        found = [
            _curve(plan, fixed, number, layer, names, in_bytes)
            for number in auto
            for layer in plan.targets[number]
            for names in plan.groups(number, layer)
        ]
    except DataDecide:
        if plan.prepared and plan.prepared_terms is None:
            return
        raise recipe.error(
            ("budget",), "the sizes of the steps that are not size: auto depend on data"
        ) from None
    rest_in_scope = rest - sum(present for _, present in found)
    plan.curves = [curve for curve, _ in found]
    plan.budget = plan.allowed - rest_in_scope
    items = merged_curves(plan, plan.curves)
    smallest = sum(curve.cost[0] for curve in items)
    if plan.budget < smallest:
        least = (rest_in_scope + smallest) / plan.scope
        raise recipe.error(
            ("budget",),
            f"at most {1 - least:.1%} of the {budget.of} can be removed by these steps, "
            f"not {1 - budget.kept:.1%}{group_rule(plan)}",
        )
    largest = sum(curve.cost[-1] for curve in items)
    if largest < plan.budget - TOLERANCE * plan.scope:
        plan.reachable = rest_in_scope + largest
        used = plan.reachable / plan.scope
        plan.warnings.append(
            f"the largest sizes of the auto steps keep {used:.1%} of the {budget.of}: the budget "
            f"of {budget.kept:.1%} cannot be used up"
        )
    if plan.needs_curves:
        _check_feasible(plan)


def group_rule(plan: Plan) -> str:
    """In words for a message, why numbers of experts are what they are; empty if nothing binds."""
    removing = any(step.auto and step.method.scope == "experts" for step in plan.recipe.steps)
    groups = max((site.groups for sites in plan.sites for site in sites.values()), default=1)
    if not removing or groups == 1:
        return ""
    return f" (as many experts of each of the router's {groups} groups stay, and two at least)"


def _check_overlap(plan: Plan, auto: list[int]) -> None:
    """Two methods may share a bank's budget only if they rewrite different terms of it."""
    seen: dict[tuple[int, str], int] = {}
    for number in auto:
        stage = plan.recipe.steps[number].stage
        for layer, banks in plan.targets[number].items():
            for bank in banks:
                other = seen.setdefault((layer, bank), number)
                if other != number and plan.recipe.steps[other].stage == stage:
                    raise plan.recipe.error(
                        ("steps", number),
                        f"two {stage} steps with size: auto work on {bank} of layer {layer}",
                    )


def _even_share(plan: Plan) -> float:
    """The share of their parameters that the budget leaves the auto steps' banks, split evenly.

    Counted as if only those banks changed.
    """
    assert plan.recipe.budget is not None and plan.allowed is not None
    in_bytes = plan.recipe.budget.unit == "bytes"
    touched = {
        (layer, bank)
        for number, step in enumerate(plan.recipe.steps)
        if step.auto
        for layer, banks in plan.targets[number].items()
        for bank in banks
    }
    whole = 0
    for layer, bank in touched:
        site = plan.sites[layer][bank]
        itemsize = plan.source_dtype(layer, site).itemsize if in_bytes else 1
        whole += site.shape.parameters * itemsize
    rest = (plan.plain.bytes if in_bytes else plan.plain.parameters) - plan.outside - whole
    return max(0.0, (plan.allowed - rest) / whole)


def _check_feasible(plan: Plan) -> None:
    """Lets the allocator refuse what it will refuse, before errors are measured.

    Any falling errors will do: whether a budget can be met depends on costs alone. Convex ones, as
    those that are measured mostly are: with straight ones every choice would be as good as another,
    and an allocator might try them all.
    """
    allocate = plan.recipe.allocate
    assert allocate is not None and plan.budget is not None
    stand_ins = [
        SizeCurve(c.item, c.settings, c.cost, tuple((1 - x / c.cost[-1]) ** 2 for x in c.cost))
        for c in merged_curves(plan, plan.curves)
    ]
    with calling(allocate.method, "allocate"):
        allocate.method.allocate(stand_ins, plan.budget, allocate.options)


def _scope(plan: Plan, cost: Callable[[list[Term]], int]) -> tuple[int, int]:
    """What the budget's scope costs in the original: as it is stored, and dequantised.

    The two differ in bytes only, and where the source stores weights quantised.
    """
    assert plan.recipe.budget is not None
    of, in_bytes = plan.recipe.budget.of, plan.recipe.budget.unit == "bytes"
    if of == "model":
        if not in_bytes:
            return plan.plain.parameters, plan.plain.parameters
        unread = sum(plan.source.stored_bytes(name) for name in plan.unread.names)
        return plan.original.bytes - unread, plan.plain.bytes
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
    stored = dequantised = 0
    for layer, name in sorted(chosen):
        site = plan.sites[layer][name]
        own = cost(plan.original_terms(layer, site))
        dequantised += own
        stored += round(own * stored_share(plan, layer, site)) if in_bytes else own
    return stored, dequantised


def merged_curves(plan: Plan, curves: list[SizeCurve]) -> list[SizeCurve]:
    """The curves as an allocator sees them: one for a step that takes the same size in all layers.

    Its settings are those that every layer has; costs and errors add up. The item bears the first
    layer's number.
    """
    alone: list[SizeCurve] = []
    shared: dict[int, list[SizeCurve]] = {}
    for curve in curves:
        number = curve.item[0]
        if plan.recipe.steps[number].method.same_size:
            shared.setdefault(number, []).append(curve)
        else:
            alone.append(curve)
    return alone + [_sum(plan, number, parts) for number, parts in shared.items()]


def _sum(plan: Plan, number: int, parts: list[SizeCurve]) -> SizeCurve:
    """One curve of a step over all its layers."""
    first = parts[0]
    settings = tuple(s for s in first.settings if all(s in part.settings for part in parts))
    if not settings:
        raise plan.recipe.error(
            ("steps", number, "size"), "the layers have no size in common that they could all take"
        )
    places = [[part.settings.index(setting) for setting in settings] for part in parts]
    cost = [
        sum(part.cost[place[i]] for part, place in zip(parts, places, strict=True))
        for i in range(len(settings))
    ]
    errors = [part.error for part in parts if part.error is not None]
    error = None
    if len(errors) == len(parts):
        error = tuple(
            sum(known[place[i]] for known, place in zip(errors, places, strict=True))
            for i in range(len(settings))
        )
    return SizeCurve(first.item, settings, tuple(cost), error)


def _curve(
    plan: Plan, fixed: Size, number: int, layer: int, names: list[str], in_bytes: bool
) -> tuple[SizeCurve, int]:
    """The sizes that some banks may take, and what they cost now; those that cost no less left out.

    No change is a size as well, unless a merge came before: base and all residuals together store
    more than the original.

    Args:
        plan: The plan.
        fixed: All sizes, the auto steps changing nothing.
        number: The step.
        layer: The layer.
        names: Its banks that one call takes.
        in_bytes: Whether costs are bytes; parameters otherwise.
    """
    step, sites = plan.recipe.steps[number], plan.sites[layer]
    before = lay_out_layer(plan, fixed, number, layer)
    banks = banks_now(plan, layer, names, before)
    settings, costs = plan.costs(number, banks)
    if in_bytes:
        costs = _costs_in_bytes(plan, fixed, number, before, banks, settings, costs)
    first = too_small(plan, number, layer, names, settings[:-1], before)
    possible = list(zip(settings, costs, strict=True))[first:]
    pairs = _rising([(setting, cost) for setting, cost in possible if cost < costs[-1]])
    original = sum(sites[name].shape.parameters for name in names)
    grown = sum(bank.without_biases().parameters() for bank in banks.values())
    if not pairs or step.stage != "decompose" or grown <= original:
        pairs.append((DENSE, costs[-1]))
    curve = SizeCurve(
        (number, layer, "+".join(names)), tuple(s for s, _ in pairs), tuple(c for _, c in pairs)
    )
    return curve, costs[-1]


def _rising(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Settings and costs without those that cost no more than a smaller one (by rounding)."""
    found: list[tuple[int, int]] = []
    for setting, cost in pairs:
        if not found or cost > found[-1][1]:
            found.append((setting, cost))
    return found


def _costs_in_bytes(
    plan: Plan,
    fixed: Size,
    number: int,
    before: MetaTerms,
    banks: dict[str, Bank],
    settings: list[int],
    parameters: list[int],
) -> list[int]:
    """What each setting stores in bytes once all steps are done: dtypes and storage may change.

    Args:
        plan: The plan.
        fixed: All sizes, the auto steps changing nothing.
        number: The step.
        before: What earlier steps made of the layer.
        banks: The banks that one call of it takes, as those left them.
        settings: The step's settings.
        parameters: What each stores of what the step rewrites.
    """
    names = list(banks)
    layer = banks[names[0]].layer
    later = [
        other
        for other in range(number + 1, len(plan.recipe.steps))
        if set(names) & set(plan.targets[other].get(layer, ()))
    ]

    def finished(setting: int) -> int:
        changed = {layer: dict(before.get(layer, {}))}
        if setting != DENSE:
            apply_layout(plan, number, layer, names, setting, changed)
        for other in later:
            for group in groups(plan, other, layer):
                size = fixed[other, layer, group[0]]
                if not plan.passes_over(other, size):
                    apply_layout(plan, other, layer, group, size, changed)
        return sum(bank.nbytes() for bank in banks_now(plan, layer, names, changed).values())

    # The bytes of what the step rewrites; the rest of the banks (a base, biases) is a constant.
    whole = sum(bank.parameters() for bank in banks.values())
    widest = max(term.dtype.itemsize for bank in banks.values() for term in bank.terms)
    present = sum(bank.nbytes() for bank in banks.values())
    dense = parameters[-1] * widest
    try:
        if later:
            present = finished(DENSE)
            dense = present * parameters[-1] // whole
        costs = [finished(setting) - (present - dense) for setting in settings[:-1]]
    except DataDecide:
        storage = plan.storage_dtype(layer, plan.sites[layer][names[0]])
        costs = [count * storage.itemsize for count in parameters[:-1]]
    return [*costs, dense]
