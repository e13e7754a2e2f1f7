"""Tries an allocator on made-up curves: it spends what it may, on what exists, every time alike."""

from __future__ import annotations

import random
from typing import Any

from ..errors import UserError
from ..hookspecs import Method, MethodOptions
from ..terms import DENSE, SizeCurve
from .calls import Watch

LAYERS, BANKS, SETTINGS, STEP = 3, ("experts.gate", "experts.down"), 8, 100


def made_up_curves(seed: int = 0) -> list[SizeCurve]:
    """Curves of some banks that cost alike and lose differently, of steps of one size."""
    source = random.Random(seed)
    curves = []
    for layer in range(LAYERS):
        for bank in BANKS:
            scale = source.uniform(0.5, 20.0)
            cost = [STEP * (k + 1) for k in range(SETTINGS)]
            error = [scale * (SETTINGS - 1 - k) ** 2 for k in range(SETTINGS)]
            settings = (*range(1, SETTINGS), DENSE)
            item = (0, layer, bank)
            curves.append(
                SizeCurve(item, settings, tuple(cost), tuple(error), tuple(1e3 * e for e in error))
            )
    return curves


def check_allocator(method: Method, options: MethodOptions, watch: Watch) -> None:
    """Calls an allocator at several budgets and notes what is wrong.

    Args:
        method: The allocator.
        options: Its options.
        watch: Where findings go; its other options are tried too.
    """
    curves = made_up_curves()
    least, most = (sum(curve.cost[at] for curve in curves) for at in (0, -1))
    for budget in (least, (least + most) // 2, most - 1):
        found = _call(method, curves, budget, options)
        if isinstance(found, str):
            watch.find("budget", f"refuses {budget} where {least} is least: {found}")
            continue
        spent = 0
        for curve in curves:
            index = found.get(curve.item)
            if index is None or not 0 <= index < len(curve.cost):
                watch.find("allocation", f"gives {curve.item} the setting {index}")
                return
            spent += curve.cost[index]
        if spent > budget:
            watch.find("budget", f"spends {spent} of {budget}")
        if budget - spent >= STEP:
            watch.find("budget", f"spends {spent} of {budget}: a step of {STEP} more can be had")
        if _call(method, curves, budget, options) != found:
            watch.find("determinism", "a second call with the same arguments gives others")
        for name, tried in watch.options.items():
            for other in tried:
                if _call(method, curves, budget, other) != found:
                    watch.effective.add(name)
                    break
    try:
        method.allocate(curves, least - 1, options)
        watch.find("errors", f"a budget of {least - 1}, below the least of {least}, is accepted")
    except UserError:
        pass  # as it should be
    watch.calls += 1


def _call(
    method: Method, curves: list[SizeCurve], budget: int, options: MethodOptions
) -> dict[Any, int] | str:
    """What the allocator chooses, or why it refuses."""
    try:
        return method.allocate(list(curves), budget, options)
    except UserError as error:
        return str(error)
