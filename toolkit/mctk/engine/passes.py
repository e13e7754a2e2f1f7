"""Applies a recipe's steps to one layer's banks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import MethodError, RecipeError, UserError
from ..notes import collect
from ..registry import calling, place_of
from ..terms import Bank, Bias, Term
from .prepared import on_meta

if TYPE_CHECKING:
    from ..planning import Plan, Size
    from ..recipe import Step

Banks = dict[str, Bank]
Note = dict[str, str]  # "step": who says it, "text": what


def run_passes(
    plan: Plan,
    sizes: Size,
    layer: int,
    banks: Banks,
    statistics: Any,
    after: Callable[[str, list[str], Banks], None],
    stop: int | None = None,
    prepared: tuple[Banks, set[str]] | None = None,
    notes: list[Note] | None = None,
) -> tuple[Banks, set[str]]:
    """Runs the steps on one layer.

    Args:
        plan: The run's plan.
        sizes: Every step's size on every bank.
        layer: The layer's number.
        banks: Its banks; not changed.
        statistics: The layer's `LayerStatistics`.
        after: Is called after each pass with the step's name, the banks that it worked on and all
            banks as they are then.
        stop: How many steps to run; all by default.
        prepared: What the plan's prepared steps have made of the layer: they are not run again.
        notes: Is added to: what the methods say about their work, with the step's name.

    Returns:
        All banks, and the names of those whose terms were rewritten.
    """
    now, rewritten = dict(banks), set()
    steps = list(enumerate(plan.recipe.steps))[: len(plan.recipe.steps) if stop is None else stop]
    if prepared is not None:
        now, rewritten = dict(prepared[0]), set(prepared[1])
        steps = steps[plan.prepared :]
        last = plan.recipe.steps[plan.prepared - 1]
        if rewritten:
            after(f"{last.stage}/{last.method.name}", sorted(rewritten), now)
    for number, step in steps:
        for names in plan.groups(number, layer):
            size = sizes[number, layer, names[0]]
            if plan.passes_over(number, size):
                continue
            with collect() as said:
                found = apply_step(step, names, now, banks, statistics, size)
            for name, terms in found.items():
                now[name] = replace(now[name], terms=terms)
                rewritten.add(name)
            method = f"{step.stage}/{step.method.name}"
            if notes is not None:
                notes += [{"step": method, "text": text} for text in said]
            after(method, names, now)
    return now, rewritten


def apply_step(
    step: Step, names: list[str], now: Banks, original: Banks, statistics: Any, size: int | None
) -> dict[str, list[Term]]:
    """One call of a method, its result checked."""
    place = place_of({name: now[name] for name in names})
    with calling(step.method, step.stage, place):
        try:
            found = _call(step, names, now, original, statistics, size)
        except UserError as error:
            if place in str(error) or isinstance(error, RecipeError | MethodError):
                raise
            who = f"{step.stage}/{step.method.name} on {place}"
            raise UserError(f"{who}: {error}") from error
        for name, terms in found.items():
            for term in terms:
                _check_finite(term, f"{step.stage}/{step.method.name} on {place}")
            # A bank checks that they are terms of its shape.
            Bank(name, now[name].layer, now[name].shape, terms)
    return found


def _call(
    step: Step, names: list[str], now: Banks, original: Banks, statistics: Any, size: int | None
) -> dict[str, list[Term]]:
    """Calls the hook of the step's stage."""
    method = step.method
    layer = {name: now[name] for name in names}
    kept: dict[str, list[Term]] = {}  # what stays beside the method's terms
    if step.stage == "decompose":
        name = names[0]
        # A bias is no matrix: it stays beside whatever replaces the weights.
        kept[name] = [term for term in now[name].terms if isinstance(term, Bias)]
        layer = {name: now[name].without_biases()}
        found = {name: list(method.decompose(layer[name], statistics, size, step.options))}
    elif step.stage in ("compensate", "distill"):
        before = {name: original[name] for name in names}
        arguments = (size, step.options) if step.stage == "compensate" else (step.options,)
        found = dict(getattr(method, step.stage)(layer, before, statistics, *arguments))
        if step.stage == "compensate":
            kept = {name: now[name].terms for name in names}
    else:
        found = dict(getattr(method, step.stage)(layer, statistics, size, step.options))
    for name in found:
        if name not in layer:
            raise ValueError(f"returned terms for {name}, which it was not given")
    _check_stored(step, layer, size, found)
    if step.stage == "compensate":
        return {name: [*kept[name], *terms] for name, terms in found.items()}
    return {name: [*terms, *kept.get(name, [])] for name, terms in found.items()}


def _check_stored(
    step: Step, layer: Mapping[str, Bank], size: int | None, found: Mapping[str, Sequence[Term]]
) -> None:
    """What a method stores is what its layout foretold: else a run would end at its gate.

    Raises:
        ValueError: It is more, or less.
    """
    planned = step.method.layout(on_meta(layer), size, step.options)
    if planned is None:
        return
    stored, foretold = (
        {name: sum(term.parameters() for term in terms) for name, terms in each.items()}
        for each in (found, planned)
    )
    # Data may decide which bank or member stores how much, but not how much there is.
    if stored.keys() != foretold.keys() or sum(stored.values()) != sum(foretold.values()):
        raise ValueError(f"stores {stored} parameters at size {size}, its layout() says {foretold}")


def _check_finite(term: Term, where: str) -> None:
    for name, tensor in term.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: gave NaN or infinity in {term.kind} {name}")
