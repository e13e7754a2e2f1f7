"""Sizes that a recipe states: what `{keep: 0.6}` or `{rank: 128}` come to on a step's banks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..terms import DENSE, SizeCurve
from .budget import TOLERANCE, merged_curves
from .layout import banks_now, lay_out_layer

if TYPE_CHECKING:
    from .plan import Plan


def stated(plan: Plan, number: int, layer: int, names: list[str]) -> int | None:
    """A step's setting on some banks of a layer.

    Args:
        plan: The plan.
        number: A step whose size is not `auto`.
        layer: The layer.
        names: The banks that one call of its method gets.

    Returns:
        The setting; None for a method that takes none. A merge gets what an even share of the
        budget leaves its banks.

    Raises:
        RecipeError: The banks have no such size.
    """
    step = plan.recipe.steps[number]
    size, where = step.size, ("steps", number, "size")
    if size is None:
        if step.stage != "merge" or plan.share is None:
            return None
        whole = sum(plan.sites[layer][name].shape.parameters for name in names)
        return math.floor(plan.share * whole)
    banks = f"{', '.join(names)} of layer {layer}"
    if size.rank is not None and step.stage == "decompose":
        shape = plan.sites[layer][names[0]].shape
        if size.rank > min(shape.out_features, shape.in_features):
            raise plan.recipe.error(
                where,
                f"rank {size.rank} exceeds {banks}, a "
                f"{shape.out_features} × {shape.in_features} matrix",
            )
    if step.method.same_size:
        return _common(plan, number)
    if size.rank is not None:
        return size.rank
    return _fitting(plan, number, *_choices(plan, number, layer, names), f" of {banks}")


def _choices(plan: Plan, number: int, layer: int, names: list[str]) -> tuple[list[int], list[int]]:
    """A step's settings and costs on some banks of a layer, after stated earlier steps."""
    now = lay_out_layer(plan, plan.stated_before(number, layer), number, layer)
    return plan.costs(number, banks_now(plan, layer, names, now))


def _common(plan: Plan, number: int) -> int:
    """The setting of a step that takes the same size in all its layers."""
    if number in plan.common:
        return plan.common[number]
    curves = []
    for layer in plan.targets[number]:
        for names in plan.groups(number, layer):
            settings, costs = _choices(plan, number, layer, names)
            curves.append(
                SizeCurve((number, layer, "+".join(names)), tuple(settings), tuple(costs))
            )
    [curve] = merged_curves(plan, curves)
    size, where = plan.recipe.steps[number].size, ("steps", number, "size")
    assert size is not None
    if size.rank is not None:
        if size.rank not in curve.settings:
            known = ", ".join(str(s) for s in curve.settings if s != DENSE)
            raise plan.recipe.error(where, f"{size.rank} is not a size here; there are {known}")
        found = size.rank
    else:
        found = _fitting(plan, number, curve.settings, curve.cost, "")
    plan.common[number] = found
    return found


def _fitting(
    plan: Plan, number: int, settings: Sequence[int], costs: Sequence[int], what: str
) -> int:
    """The largest setting that stores no more than the share that a step states.

    Args:
        plan: The plan.
        number: The step.
        settings: What it may be, DENSE last.
        costs: What each stores of what the step rewrites: the matrices, or a base among them.
        what: Of which banks, for messages.

    Raises:
        RecipeError: Every setting stores more; or there is one alone, and it is not what is asked.
    """
    size, where = plan.recipe.steps[number].size, ("steps", number, "size", "keep")
    assert size is not None and size.keep is not None  # a size that is stated: no rank, no auto
    shares = [cost / costs[-1] for cost in costs]
    fitting = [n for n, cost in enumerate(costs) if cost <= size.keep * costs[-1]]
    if not fitting:
        raise plan.recipe.error(
            where, f"{size.keep}{what} is below the smallest size, {shares[0]:.3f}"
        )
    found = fitting[-1]
    if len(settings) == 2 and settings[found] != DENSE and shares[found] < size.keep - TOLERANCE:
        method = plan.recipe.steps[number].method
        raise plan.recipe.error(
            where,
            f"{size.keep} has no effect: with these options {method.stage}/{method.name} has one "
            f"size{what}; write {{keep: {shares[found]:.4g}}}",
        )
    return settings[found]
