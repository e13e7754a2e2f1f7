"""What removing experts means for a plan: what it refuses, and in which form the result is written.

A result is *native* if all that was done is to remove experts, the same number in every layer: an
ordinary checkpoint of the original's architecture. All else is in mctk's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint import Share, check_fewer, experts_per_token, shares
from ..errors import UserError
from ..models import RouterSite, find_router, keeps_form
from ..terms import Bank, removed_members
from .layout import DataDecide, MetaTerms, apply_layout, banks_now, groups, with_neighbours

if TYPE_CHECKING:
    from .plan import Plan, Size


def routers(plan: Plan) -> dict[int, RouterSite]:
    """The router of every layer that has experts.

    Raises:
        UserError: A layer's router is of no form that is known.
    """
    found = {}
    for layer, (module, sites) in enumerate(zip(plan.model.layers, plan.sites, strict=True)):
        router = find_router(module, sites)
        if router is not None:
            found[layer] = router
    return found


def experts_left(plan: Plan, changed: MetaTerms) -> dict[int, int]:
    """How many experts each layer keeps, of the layers that lose some.

    Args:
        plan: The plan.
        changed: The terms of every changed module, as `Plan.layout` gives them.
    """
    found = {}
    for layer, banks in changed.items():
        sites = plan.sites[layer]
        experts = [
            Bank(name, layer, sites[name].shape, terms)
            for name, terms in banks.items()
            if sites[name].part != "linear"
        ]
        gone = removed_members(experts)
        if gone:
            found[layer] = experts[0].shape.members - len(gone)
    return found


def only_prunes(plan: Plan, sizes: Size, layer: int) -> bool:
    """Whether all that steps do to a layer's experts is pruning, so that the others stay as is."""
    for number, step in enumerate(plan.recipe.steps):
        if step.stage == "prune":
            continue
        for name in plan.targets[number].get(layer, ()):
            size = sizes[number, layer, name]
            if plan.sites[layer][name].part != "linear" and not plan.passes_over(number, size):
                return False
    return True


def output_kind(plan: Plan, sizes: Size, changed: MetaTerms | None) -> str:
    """In which form a result is written: "native" or "mctk".

    Args:
        plan: The plan.
        sizes: All sizes.
        changed: The terms of every changed module; None where data decide them.
    """
    if not changed:
        return "mctk"
    for layer, terms in changed.items():
        sites = plan.sites[layer]
        banks = [Bank(name, layer, sites[name].shape, held) for name, held in terms.items()]
        if not all(sites[name].part != "linear" for name in terms):
            return "mctk"
        if not (only_prunes(plan, sizes, layer) and keeps_form(banks)):
            return "mctk"
    return "native" if uniform(plan, experts_left(plan, changed)) else "mctk"


def uniform(plan: Plan, left: Mapping[int, int]) -> int | None:
    """How many experts every layer keeps, if all lose some and keep equally many; else None."""
    if not left or sorted(left) != with_experts(plan) or len(set(left.values())) > 1:
        return None
    return next(iter(left.values()))


def with_experts(plan: Plan) -> list[int]:
    """The layers that have experts."""
    return [
        layer
        for layer, sites in enumerate(plan.sites)
        if any(site.part == "down" for site in sites.values())
    ]


def foreseen(plan: Plan, sizes: Size | None) -> int | None:
    """How many experts config.json will say, if fewer than the source's; None: as many.

    Where data decide, the fewest that it may come to say.

    Args:
        plan: The plan.
        sizes: All sizes; None where they wait for data.
    """
    decided = sizes is not None
    if sizes is None:
        sizes = plan.sizes() if plan.pending else plan.smallest()
    layers = with_experts(plan)
    counts: set[int] = set()
    for layer in layers:
        kept = _foreseen_in_layer(plan, sizes, layer)
        if kept == _members(plan, layer):
            return None
        if kept is not None:
            counts.add(kept)
    auto = any(step.auto and step.stage == "prune" for step in plan.recipe.steps)
    if len(counts) > 1 and (decided or not auto):
        return None  # whatever the other sizes: layers keep different numbers
    return min(counts, default=1) if layers else None


def _foreseen_in_layer(plan: Plan, sizes: Size, layer: int) -> int | None:
    """How many experts a layer keeps; None where some go and only data can tell how many.

    What data decide of other than pruning steps does not change the number: those that follow are
    asked about the terms before it.
    """
    experts = {name for name, site in plan.sites[layer].items() if site.part != "linear"}
    changed: MetaTerms = {layer: {}}
    first, known = 0, True
    if plan.prepared_terms is not None:
        changed = {layer: dict(plan.prepared_terms.get(layer, {}))}
        first = plan.prepared
    for number in range(first, len(plan.recipe.steps)):
        step = plan.recipe.steps[number]
        for names in groups(plan, number, layer):
            prunes = step.stage == "prune" and not experts.isdisjoint(names)
            size = sizes[number, layer, names[0]]
            try:
                if plan.pending and step.auto and prunes:
                    size = plan.costs(number, banks_now(plan, layer, names, changed))[0][0]
                if not plan.passes_over(number, size):
                    apply_layout(plan, number, layer, names, size, changed)
            except DataDecide:
                if prunes:
                    return None
                known = False
            except UserError:
                if known:
                    raise
                # It asks for what the step before it makes of data, as a delta does for a base.
    whole = with_neighbours(plan, {layer: changed[layer]})
    return experts_left(plan, whole).get(layer, _members(plan, layer))


def _members(plan: Plan, layer: int) -> int:
    """How many experts a layer has."""
    return next(s.shape.members for s in plan.sites[layer].values() if s.part == "down")


def check_removal(plan: Plan, sizes: Size) -> None:
    """Refuses results that could not be routed, or not be written.

    Raises:
        UserError: Too few experts are left for a token's choice or for the router's groups, or it
            is not known which of the checkpoint's tensors would shrink.
    """
    changed = plan.layout(sizes)
    left = experts_left(plan, changed) if changed else {}
    if not left:
        return
    for layer, kept in left.items():
        _check_count(plan, layer, kept)
    config_without(plan, left)


def config_without(plan: Plan, left: Mapping[int, int]) -> dict[str, Any] | None:
    """The config.json of a result whose layers keep so many experts.

    It is checked against the shapes of all tensors that will be written, once a number.

    Args:
        plan: The plan.
        left: How many experts each layer keeps, of the layers that lose some.

    Returns:
        The source's with another number of experts; None if layers differ, and it stays as it is.

    Raises:
        UserError: What would be written cannot be told, or is not what config.json could say.
    """
    every = routers(plan)
    counts = {router.experts for router in every.values()}
    if len(counts) > 1:
        raise UserError(
            f"steps: layers differ in their number of experts ({sorted(counts)}); removing some "
            "is not supported yet"
        )
    kept = uniform(plan, left) or min(left.values())
    if kept not in plan.configs:
        shrinking = [layer_shares(plan, layer, router) for layer, router in every.items()]
        plan.configs[kept] = check_fewer(
            plan.source,
            plan.model.config,
            plan.model.dtype,
            plan.recipe.trust_remote_code,
            shrinking,
            counts.pop(),
            kept,
        )
    return plan.configs[kept] if uniform(plan, left) else None


def layer_shares(plan: Plan, layer: int, router: RouterSite) -> dict[str, Share]:
    """The source tensors of a layer that shrink or go with experts."""
    return shares(
        plan.source,
        plan.model.weights,
        plan.model.layer_tensors[layer],
        f"{plan.model.layers_path}.{layer}.",
        router,
    )


def _check_count(plan: Plan, layer: int, kept: int) -> None:
    wrong = unreachable(plan, layer, kept)
    if wrong is not None:
        what = f"{kept} experts in layer {layer}: {wrong}"
        raise plan.recipe.error(_who_removes(plan, layer), what)


def unreachable(plan: Plan, layer: int, kept: int) -> str | None:
    """Why a layer's router could not work with so many experts; None if it can."""
    k = experts_per_token(plan.model.config)
    router = find_router(plan.model.layers[layer], plan.sites[layer])
    assert router is not None
    if kept < k:
        return f"a token uses {k}"
    groups, top = router.groups, router.top_groups
    if groups > 1 and (kept % groups or kept < 2 * groups):
        return (
            f"the router has {groups} groups, each of which must keep as many, at least 2: keep "
            f"a multiple of {groups}, at least {2 * groups}"
        )
    if groups > 1 and kept // groups * top < k:
        return f"a token uses {k} experts of {top} groups, which would have {kept // groups} each"
    return None


def _who_removes(plan: Plan, layer: int) -> tuple[str | int, ...]:
    """The key of the recipe that decides how many experts of a layer stay."""
    for number, step in enumerate(plan.recipe.steps):
        if step.stage == "prune" and layer in plan.targets[number]:
            return ("budget",) if step.auto else ("steps", number, "size")
    return ("steps",)


def too_small(
    plan: Plan, number: int, layer: int, names: list[str], settings: list[int], before: MetaTerms
) -> int:
    """How many of a step's settings, from the smallest, leave a layer too few experts.

    Args:
        plan: The plan.
        number: The step.
        layer: The layer.
        names: The banks that one call of it takes.
        settings: The settings that change something, ascending.
        before: What earlier steps made of the layer.
    """
    experts = [name for name, site in plan.sites[layer].items() if site.part != "linear"]
    if plan.recipe.steps[number].stage != "prune" or not set(names) & set(experts):
        return 0
    for place, setting in enumerate(settings):
        after = {layer: dict(before.get(layer, {}))}
        try:
            apply_layout(plan, number, layer, names, setting, after)
        except DataDecide:
            return place
        gone = removed_members(banks_now(plan, layer, experts, after).values())
        kept = plan.sites[layer][experts[0]].shape.members - len(gone)
        if not gone or unreachable(plan, layer, kept) is None:
            return place
    return len(settings)


def check_kept(plan: Plan, banks: Mapping[str, Bank]) -> None:
    """Checks which experts a layer's steps have left, once they are known.

    Raises:
        UserError: The router could not work with them.
    """
    gone = removed_members(banks.values())
    if not gone:
        return
    bank = next(bank for name, bank in banks.items() if name.startswith("experts."))
    experts, layer = bank.shape.members, bank.layer
    _check_count(plan, layer, experts - len(gone))
    size = experts // bank.groups
    each = {sum(member // size == group for member in gone) for group in range(bank.groups)}
    if len(each) > 1:
        raise UserError(
            f"layer {layer}: experts {', '.join(map(str, gone))} would go, and the router's "
            f"{bank.groups} groups would keep different numbers; the method must take as many of "
            "each"
        )
