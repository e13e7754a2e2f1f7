"""What a run's steps work on and need: targets, statistics, and which steps are *prepared*.

Most statistics are those of the original model and serve every step. Two kinds are not: those too
large to keep (elementwise Fisher information lives for its layer only), and those of what earlier
steps leave (`of="current"`: outputs of a residual that a merge made). Steps up to the last one that
such statistics depend on are *prepared*: they are run first, their result is kept, and what is
measured on it comes afterwards. Their sizes cannot be left to an allocator, which decides last.

With `propagate: compressed` the other steps' statistics are *recollected*, layer by layer, on what
the run's own compressed layers pass on; sizes are decided before, by those of the original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..errors import nearest
from ..registry import calling
from ..statistics import ExpertFrequency, LayerPassed, LayerSamples, Need, check_needs

if TYPE_CHECKING:
    from ..models import BankSite
    from ..recipe import Recipe
    from .plan import Plan

TRACE_TOKENS = 4096  # tokens of the kept sample on which each pass's error is measured


def find_targets(
    recipe: Recipe, number: int, sites: list[dict[str, BankSite]]
) -> dict[int, list[str]]:
    """The banks that a step works on, by layer.

    Raises:
        RecipeError: A glob matches no bank of the chosen layers, or a method that works on whole
            experts is to work on parts of them, or on other banks.
    """
    step = recipe.steps[number]
    found: dict[int, list[str]] = {}
    for layer, banks in enumerate(sites):
        names = [name for name in banks if step.selects(layer, name)]
        if names:
            if step.method.scope == "experts":
                _check_whole(recipe, number, layer, banks, names)
            found[layer] = names
    known = {name for layer, banks in enumerate(sites) if layer in step.layers for name in banks}
    for glob in step.targets:
        if not any(fnmatchcase(name, glob) for name in known):
            raise recipe.error(
                ("steps", number, "targets"),
                f"no bank of the chosen layers matches {glob}{nearest(glob, known)}",
            )
    return found


def _check_whole(
    recipe: Recipe, number: int, layer: int, banks: dict[str, BankSite], names: list[str]
) -> None:
    """Checks that the targets in a layer are all banks of its experts, and no others."""
    method = recipe.steps[number].method
    experts = [name for name, site in banks.items() if site.part != "linear"]
    wrong = [name for name in names if name not in experts]
    missing = [name for name in experts if name not in names]
    if wrong or missing:
        what = f"not {wrong[0]}" if wrong else f"{missing[0]} is not among the targets"
        raise recipe.error(
            ("steps", number, "targets"),
            f"{method.stage}/{method.name} works on whole experts, and in layer {layer} "
            f"{what}: target experts.*",
        )


def find_needs(plan: Plan) -> None:
    """Sets the plan's `needs`, those that are `recollected`, and how many steps are prepared.

    Raises:
        RecipeError: Statistics are needed without calibration text, or a step must be prepared
            whose size the budget decides.
        UserError: A layer's router cannot be asked what a step wants to know of it.
    """
    found: dict[int, dict[Need, list[int]]] = {}  # layer → need → the steps that ask
    barrier: tuple[int, int, Need] | None = None  # steps prepared, the step that asks, for what
    for number, step in enumerate(plan.recipe.steps):
        for layer, banks in plan.targets[number].items():
            sites = plan.sites[layer]
            for bank in banks:
                with calling(step.method, "needs", f"{bank} of layer {layer}"):
                    asked_for = list(step.method.needs(sites[bank].shape, bank, step.options))
                    _check_asked(asked_for, sites)
                for need in asked_for:
                    prepared = number + 1 if need.transient else 0
                    if need.current or need.compressed:
                        prepared = _steps_before(plan, number, layer, bank, need)
                        if need.current and not prepared:
                            need = dataclasses.replace(need, **{"of": "original"})
                    if need.compressed and plan.recipe.propagate == "compressed":
                        _refuse_both(plan, number)
                    if prepared and (barrier is None or prepared > barrier[0]):
                        barrier = (prepared, number, need)
                    asking = found.setdefault(layer, {}).setdefault(need.canonical(sites), [])
                    asking.append(number)
    asked = sorted({type(n).__name__ for layer in found.values() for n in layer})
    if asked and plan.recipe.calibration is None:
        raise plan.recipe.error((), f"calibration is missing; the steps need {', '.join(asked)}")
    if barrier is not None:
        plan.prepared = barrier[0]
        _check_prepared(plan, *barrier)
    for layer, needs in found.items():
        check_needs(plan.model.layers[layer], plan.sites[layer], needs)
        plan.needs[layer] = [n for n, asking in needs.items() if _original(plan, n, asking)]
        again = [n for n, asking in needs.items() if _recollected(plan, n, asking)]
        if again:
            plan.recollected[layer] = again
    if plan.recipe.calibration is not None:
        _add_own(plan, plan.needs)


def _check_asked(asked_for: list[Need], sites: Mapping[str, BankSite]) -> None:
    """A method asks for needs, of banks that the layer has.

    Raises:
        TypeError: It asks for something else.
        ValueError: The layer has no such bank.
    """
    for need in asked_for:
        if not isinstance(need, Need):
            raise TypeError(f"asks for {need!r}, which is no need of mctk.statistics")
        bank = getattr(need, "bank", None)
        if isinstance(bank, str) and bank not in sites:
            near = nearest(bank, sites)
            raise ValueError(f"asks for {need}, and the layer has no such bank{near}")


def _original(plan: Plan, need: Need, asking: list[int]) -> bool:
    """Whether a statistic is taken with the original's layers before it.

    With `propagate: compressed` that is so for gradients, for prepared steps, and where size curves
    are measured before sizes are decided.
    """
    if need.compressed:
        return False
    if plan.recipe.propagate == "original" or need.gradient or plan.needs_curves:
        return True
    return any(number < plan.prepared for number in asking)


def _recollected(plan: Plan, need: Need, asking: list[int]) -> bool:
    """Whether a statistic is taken on what the run's own compressed layers pass on."""
    if need.compressed:
        return True
    sequential = plan.recipe.propagate == "compressed" and not need.gradient
    return sequential and any(number >= plan.prepared for number in asking)


def _refuse_both(plan: Plan, number: int) -> None:
    """A moment of compressed activations beside the original's, where there is no original's."""
    step = plan.recipe.steps[number]
    raise plan.recipe.error(
        ("calibration", "propagate"),
        f"{step.stage}/{step.method.name} (steps.{number}) compares the original's activations "
        "with the compressed model's, and with propagate: compressed all are the latter's; write "
        "propagate: original",
    )


def _steps_before(plan: Plan, number: int, layer: int, bank: str, need: Need) -> int:
    """How many steps have to be done before a statistic "of what is there now" can be measured.

    What enters a bank changes only where a merge has put an expert's neurons in another order;
    what its matrices put out changes with every step on it.
    """
    module = plan.sites[layer][bank].module
    inputs = getattr(need, "side", "input") == "input"
    last = 0
    for earlier in range(number):
        if inputs and plan.recipe.steps[earlier].stage != "merge":
            continue
        names = plan.targets[earlier].get(layer, [])
        if any(plan.sites[layer][name].module == module for name in names):
            last = earlier + 1
    return last


def _add_own(plan: Plan, needs: dict[int, list[Need]]) -> None:
    """Adds what the engine itself wants of every layer that is worked on."""
    for layer in sorted({layer for step in plan.targets for layer in step}):
        wanted = needs.setdefault(layer, [])
        wanted.append(LayerSamples(TRACE_TOKENS))
        if plan.model.wiring.more:
            wanted.append(LayerPassed(TRACE_TOKENS))
        has_experts = any(site.part == "down" for site in plan.sites[layer].values())
        if has_experts and ExpertFrequency() not in wanted:
            wanted.append(ExpertFrequency())  # tokens per expert are part of every report


def _check_prepared(plan: Plan, prepared: int, asking: int, need: Need) -> None:
    """A prepared step cannot wait for an allocator."""
    for number, step in enumerate(plan.recipe.steps[:prepared]):
        if not step.auto:
            continue
        name = f"{plan.recipe.steps[asking].stage}/{plan.recipe.steps[asking].method.name}"
        what = f"{name} (steps.{asking}) needs {type(need).__name__}"
        why = (
            f"{what}, which is too large to keep until sizes are decided"
            if need.transient
            else f"{what} of what this step leaves"
        )
        raise plan.recipe.error(
            ("steps", number, "size"), f"auto is not possible here: {why}; state a size"
        )
