"""Sizes that a recipe states: what `{keep: 0.6}` or `{rank: 128}` come to on a step's banks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..terms import DENSE, SizeCurve
from .budget import merged_curves
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
    assert size.keep is not None  # a size that is not auto has a rank or a share
    settings, costs = _choices(plan, number, layer, names)
    whole = costs[-1]  # of what the step rewrites: the matrices, or a base among them
    fitting = [s for s, c in zip(settings, costs, strict=True) if c <= size.keep * whole]
    if not fitting:
        raise plan.recipe.error(
            where,
            f"keep {size.keep} of {banks} is below the smallest size, {costs[0] / whole:.3f}",
        )
    return fitting[-1]


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
        assert size.keep is not None
        most = size.keep * curve.cost[-1]
        fitting = [s for s, c in zip(curve.settings, curve.cost, strict=True) if c <= most]
        if not fitting:
            least = curve.cost[0] / curve.cost[-1]
            raise plan.recipe.error(
                where, f"keep {size.keep} is below the smallest size, {least:.3f}"
            )
        found = fitting[-1]
    plan.common[number] = found
    return found
