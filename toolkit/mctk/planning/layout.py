"""What the banks will look like: steps applied to terms without data, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import UserError
from ..models import neighbours
from ..registry import calling, place_of
from ..runtime import is_expert_list
from ..terms import Bank, Bias, ExpertSkip, Term

if TYPE_CHECKING:
    from .plan import Plan, Size

MetaTerms = dict[int, dict[str, list[Term]]]  # layer → bank → terms on the meta device


class DataDecide(Exception):
    """A step's layout depends on data."""


def groups(plan: Plan, number: int, layer: int) -> list[list[str]]:
    """The banks of a layer that one call of a step's method gets: one, or all that it targets."""
    names = plan.targets[number].get(layer, [])
    if plan.recipe.steps[number].method.scope != "bank":
        return [names] if names else []
    return [[name] for name in names]


def banks_now(plan: Plan, layer: int, names: list[str], changed: MetaTerms) -> dict[str, Bank]:
    """Some banks of a layer as they are after the steps that `changed` tells of."""
    found = {}
    for name in names:
        site = plan.sites[layer][name]
        terms = changed.get(layer, {}).get(name)
        if terms is None:
            terms = plan.original_terms(layer, site)
        found[name] = Bank(name, layer, site.shape, list(terms), site.groups)
    return found


def step_banks(plan: Plan, number: int, banks: Mapping[str, Bank]) -> dict[str, Bank]:
    """The banks as a step's hooks get them: `decompose` is spared the biases."""
    if plan.recipe.steps[number].stage != "decompose":
        return dict(banks)
    return {name: bank.without_biases() for name, bank in banks.items()}


def apply_layout(
    plan: Plan, number: int, layer: int, names: list[str], size: int | None, changed: MetaTerms
) -> None:
    """Enters into `changed` what a step makes of some banks.

    Raises:
        DataDecide: Only data can tell.
        UserError: The method refuses banks of this form.
    """
    step = plan.recipe.steps[number]
    banks = banks_now(plan, layer, names, changed)
    with calling(step.method, "layout", place_of(banks)):
        try:
            found = step.method.layout(step_banks(plan, number, banks), size, step.options)
        except UserError as error:
            raise plan.recipe.error(("steps", number), str(error)) from error
    if found is None:
        raise DataDecide(number)
    _check_skips(plan, number, layer, found)
    now = changed.setdefault(layer, {})
    for name, terms in found.items():
        dtype = plan.storage_dtype(layer, plan.sites[layer][name])
        before = banks[name].terms
        kept: list[Term] = []
        if step.stage == "compensate":
            kept = before  # that adds; all else replaces
        elif step.stage == "decompose":
            kept = [term for term in before if isinstance(term, Bias)]
        now[name] = [term.to(dtype=dtype) for term in (*terms, *kept)]


def _check_skips(plan: Plan, number: int, layer: int, found: Mapping[str, Sequence[Term]]) -> None:
    """Experts that the model's own code calls one by one cannot be skipped at run time."""
    for name, terms in found.items():
        module = plan.model.layers[layer].get_submodule(plan.sites[layer][name].module)
        if is_expert_list(module) and any(isinstance(term, ExpertSkip) for term in terms):
            raise plan.recipe.error(
                ("steps", number),
                f"the model's own code calls the experts of layer {layer} one by one: no choice of "
                "a token can be skipped",
            )


def lay_out(plan: Plan, sizes: Size) -> MetaTerms:
    """Applies all steps to all layers; see `lay_out_layer`."""
    changed: MetaTerms = {}
    for layer in range(len(plan.sites)):
        changed |= lay_out_layer(plan, sizes, len(plan.recipe.steps), layer)
    return changed


def lay_out_layer(plan: Plan, sizes: Size, steps: int, layer: int) -> MetaTerms:
    """Applies the first `steps` steps to a layer; only banks that they rewrite appear.

    Where the prepared steps have been run, what they made is taken instead.

    Raises:
        DataDecide: Only data can tell.
    """
    changed: MetaTerms = {}
    first = 0
    if plan.prepared_terms is not None and steps >= plan.prepared:
        changed = {layer: dict(plan.prepared_terms.get(layer, {}))}
        first = plan.prepared
    for number in range(first, steps):
        for names in groups(plan, number, layer):
            size = sizes[number, layer, names[0]]
            if not plan.passes_over(number, size):
                apply_layout(plan, number, layer, names, size, changed)
    return {layer: banks for layer, banks in changed.items() if banks}


def with_neighbours(plan: Plan, changed: MetaTerms) -> MetaTerms:
    """Adds the untouched banks of every module that holds a changed one: they are stored with it.

    A module is changed if any of its banks is; its other banks are stored as they were.
    """
    whole: MetaTerms = {}
    for layer, banks in changed.items():
        sites = plan.sites[layer]
        whole[layer] = {
            name: banks[name] if name in banks else plan.original_terms(layer, sites[name])
            for name in neighbours(sites, banks)
        }
    return whole
