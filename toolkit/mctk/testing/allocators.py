"""Tries an allocator on made-up curves: it spends what it may, on what exists, every time alike."""

from __future__ import annotations

import random
from typing import Any

from ..errors import UserError
from ..hookspecs import Method, MethodOptions
from ..terms import DENSE, SizeCurve
from .watch import Watch, described

LAYERS, BANKS, SETTINGS, STEP = 3, ("experts.gate", "experts.down"), 8, 100

Allocation = dict[Any, int]


def made_up_curves(errors: bool, seed: int = 0) -> list[SizeCurve]:
    """Curves of some banks that cost alike and lose differently, in steps of one size.

    Args:
        errors: Whether they say what is lost; an allocator that asks for none is given none.
        seed: Of the losses.
    """
    source = random.Random(seed)
    cost = tuple(STEP * (k + 1) for k in range(SETTINGS))
    curves = []
    for layer in range(LAYERS):
        for bank in BANKS:
            scale = source.uniform(0.5, 20.0)
            error = tuple(scale * (SETTINGS - 1 - k) ** 2 for k in range(SETTINGS))
            raw = tuple(1e3 * e for e in error)
            known = (error, raw) if errors else (None, None)
            curves.append(SizeCurve((0, layer, bank), (*range(1, SETTINGS), DENSE), cost, *known))
    return curves


def check_allocator(method: Method, options: MethodOptions, watch: Watch) -> None:
    """Calls an allocator at several budgets and notes what is wrong.

    Args:
        method: The allocator.
        options: Its options.
        watch: Where findings go; its other options are tried too.
    """
    curves = made_up_curves(method.needs_curves)
    least, most = (sum(curve.cost[at] for curve in curves) for at in (0, -1))
    for budget in (least, (least + most) // 2, most - 1):
        found = _ask(method, curves, budget, options, watch)
        if found is None:
            continue
        if isinstance(found, str):
            watch.find("budget", f"refuses {budget} where {least} is the least: {found}")
            continue
        _check_spending(found, curves, budget, watch)
        if _ask(method, curves, budget, options, watch) != found:
            watch.find("determinism", "a second call with the same arguments gives others")
        for name, tried in watch.options.items():
            if any(_ask(method, curves, budget, o, watch) not in (found, None) for o in tried):
                watch.effective.add(name)
    if not isinstance(_ask(method, curves, least - 1, options, watch), str | None):
        watch.find("errors", f"a budget of {least - 1}, below the least of {least}, is accepted")


def _check_spending(found: Allocation, curves: list[SizeCurve], budget: int, watch: Watch) -> None:
    """Every bank gets a setting that it has, and together they cost what they may."""
    spent = 0
    for curve in curves:
        index = found.get(curve.item)
        if not isinstance(index, int) or not 0 <= index < len(curve.cost):
            watch.find("allocation", f"gives {curve.item} the setting {index!r}")
            return
        spent += curve.cost[index]
    if spent > budget:
        watch.find("budget", f"spends {spent} of {budget}")
    if budget - spent >= STEP:
        watch.find("budget", f"spends {spent} of {budget}: a step of {STEP} more can be had")


def _ask(
    method: Method, curves: list[SizeCurve], budget: int, options: MethodOptions, watch: Watch
) -> Allocation | str | None:
    """What the allocator chooses, or why it refuses; None after any other exception."""
    watch.calls += 1
    try:
        return dict(method.allocate(list(curves), budget, options))
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a stranger's method may raise
        watch.find("errors", f"at a budget of {budget}: {described(error, method)}")
        return None
