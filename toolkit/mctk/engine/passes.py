"""Applies a recipe's steps to one layer's banks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UserError, brief
from ..terms import DENSE, Bank, Bias, Term

if TYPE_CHECKING:
    from ..plan import Plan, Size
    from ..recipe import Step

Banks = dict[str, Bank]


def run_passes(
    plan: Plan,
    sizes: Size,
    layer: int,
    banks: Banks,
    statistics: Any,
    after: Callable[[str, list[str], Banks], None],
) -> tuple[Banks, set[str]]:
    """Runs all steps on one layer.

    Args:
        plan: The run's plan.
        sizes: Every step's size on every bank.
        layer: The layer's number.
        banks: Its banks; not changed.
        statistics: The layer's `LayerStatistics`.
        after: Is called after each pass with the step's name, the banks that it worked on and all
            banks as they are then.

    Returns:
        All banks, and the names of those whose terms were rewritten.
    """
    now = dict(banks)
    rewritten: set[str] = set()
    for number, step in enumerate(plan.recipe.steps):
        names = [
            name
            for name in plan.targets[number].get(layer, [])
            if sizes[number, layer, name] != DENSE
        ]
        groups = [[name] for name in names] if step.method.scope == "bank" else [names]
        for group in groups:
            if not group:
                continue
            size = sizes[number, layer, group[0]]
            for name, terms in _apply(step, group, now, banks, statistics, size).items():
                now[name] = Bank(name, layer, now[name].shape, terms)
                rewritten.add(name)
            after(f"{step.stage}/{step.method.name}", group, now)
    return now, rewritten


def _apply(
    step: Step, names: list[str], now: Banks, original: Banks, statistics: Any, size: int | None
) -> dict[str, list[Term]]:
    """One call of a method, its result checked."""
    where = f"{step.stage}/{step.method.name} on {', '.join(names)} of layer {now[names[0]].layer}"
    try:
        found = _call(step, names, now, original, statistics, size)
        for name, terms in found.items():
            for term in terms:
                _check_finite(term, where)
            # A bank checks that they are terms of its shape.
            Bank(name, now[name].layer, now[name].shape, terms)
    except UserError:
        raise
    except Exception as error:  # whatever a stranger's method may raise
        raise UserError(f"{where} failed: {type(error).__name__}: {brief(error)}") from error
    return found


def _call(
    step: Step, names: list[str], now: Banks, original: Banks, statistics: Any, size: int | None
) -> dict[str, list[Term]]:
    """Calls the hook of the step's stage."""
    method = step.method
    layer = {name: now[name] for name in names}
    if step.stage == "decompose":
        name = names[0]
        # A bias is no matrix: it stays beside whatever replaces the weights.
        biases = [term for term in now[name].terms if isinstance(term, Bias)]
        bank = weights_of(now[name])
        found = {name: [*method.decompose(bank, statistics, size, step.options), *biases]}
    elif step.stage in ("compensate", "distill"):
        before = {name: original[name] for name in names}
        arguments = (size, step.options) if step.stage == "compensate" else (step.options,)
        found = dict(getattr(method, step.stage)(layer, before, statistics, *arguments))
        if step.stage == "compensate":
            found = {name: [*now[name].terms, *terms] for name, terms in found.items()}
    else:
        found = dict(getattr(method, step.stage)(layer, statistics, size, step.options))
    for name in found:
        if name not in layer:
            raise ValueError(f"returned terms for {name}, which it was not given")
    return found


def weights_of(bank: Bank) -> Bank:
    """The bank without its biases."""
    terms = [term for term in bank.terms if not isinstance(term, Bias)]
    return Bank(bank.name, bank.layer, bank.shape, terms)


def _check_finite(term: Term, where: str) -> None:
    for name, tensor in term.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: gave NaN or infinity in {term.kind} {name}")
