"""Size curves with errors: every auto bank's, in one unit, from the layers' statistics.

A method's curve is the squared error of its bank's output. Banks differ in what such an error does
to the layer, so each curve is put into one unit, the relative squared error of the layer's output,
by a measured exchange rate: the bank alone is compressed to a middling size, the layer's error is
measured on the kept sample, and divided by what the curve says at that size.
What the method itself gives is handed on beside it. Scores, which an allocator compares for one
method only, stay as they are.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import write_json
from ..linalg import remembered
from ..planning import Plan
from ..registry import calling, place_of
from ..sweep import StreamedModel
from ..terms import DENSE, SizeCurve
from .compress import LiveLayer, Run, Sample, room_for_directions
from .fate import alive
from .passes import Banks, apply_step
from .prepared import on_meta
from .progress import Reporter
from .trace import LayerOriginal

Errors = dict[str, list[float]]  # "error" and "raw" of a `SizeCurve`


def measure_curves(
    runs: Sequence[Run], model: StreamedModel, sample: Sample, reporter: Reporter
) -> dict[int, list[SizeCurve]]:
    """Computes the curves of all auto items of runs, a layer in memory at a time.

    Args:
        runs: The runs whose allocators read curves; those that fail are left out.
        model: The original, streamed; embeddings loaded.
        sample: The sequences that measure.
        reporter: Progress.

    Returns:
        By the run's `id`.
    """
    known: dict[int, dict[str, Errors]] = {}
    for run in runs:
        path = _path(run)
        known[id(run)] = json.loads(path.read_text()) if path.exists() else {}
    asked = {
        (id(run), layer): curves
        for run in runs
        for layer, curves in _by_layer(run.plan.curves).items()
        if any(_key(curve) not in known[id(run)] for curve in curves)
    }
    layers = sorted({layer for _, layer in asked})
    if not layers:
        return _complete(runs, known)
    with reporter.phase("size curves", len(layers)):
        for layer in layers:
            working = [run for run in alive(runs) if (id(run), layer) in asked]
            with (
                model.layer(layer) as module,
                remembered(room_for_directions(module, model.device, len(working))),
            ):
                live = LiveLayer(model, layer, module, runs[0].plan.sites[layer], sample)
                for run in working:
                    with run.fate.own():
                        known[id(run)] |= _layer_curves(run, live, asked[id(run), layer])
                        write_json(_path(run), known[id(run)])
            reporter.step(f"layer {layer}")
    return _complete(runs, known)


def _complete(
    runs: Sequence[Run], known: Mapping[int, Mapping[str, Errors]]
) -> dict[int, list[SizeCurve]]:
    """The runs' curves with their errors."""
    return {
        id(run): [_measured(curve, known[id(run)][_key(curve)]) for curve in run.plan.curves]
        for run in alive(runs)
    }


def _measured(curve: SizeCurve, errors: Errors) -> SizeCurve:
    return replace(curve, error=tuple(errors["error"]), raw=tuple(errors["raw"]))


def _path(run: Run) -> Path:
    """The JSON file that keeps a run's finished layers' curves, should it be interrupted."""
    return run.workspace.state / "curves.json"


def _by_layer(curves: Iterable[SizeCurve]) -> dict[int, list[SizeCurve]]:
    found: dict[int, list[SizeCurve]] = {}
    for curve in curves:
        found.setdefault(curve.item[1], []).append(curve)
    return found


def _key(curve: SizeCurve) -> str:
    step, layer, banks = curve.item
    return f"{layer}.{banks}.{step}"


def _layer_curves(run: Run, live: LiveLayer, curves: list[SizeCurve]) -> dict[str, Errors]:
    """The errors of one layer's auto items, in the common unit and as their methods give them."""
    plan, preparation, layer = run.plan, run.preparation, live.index
    assert preparation is not None
    found: dict[str, Errors] = {}
    original = live.banks
    statistics = preparation.statistics(layer).bind(live.module)
    whole: LayerOriginal | None = None
    if plan.recipe.allocate is None or plan.recipe.allocate.method.units != "score":
        whole = live.original(statistics)
    prepared = preparation.banks(layer, original)
    before = original if prepared is None else prepared[0]
    for curve in curves:
        number, _, names = curve.item[0], curve.item[1], curve.item[2].split("+")
        step = plan.recipe.steps[number]
        banks = {name: before[name] for name in names}
        # Explicit steps between the prepared ones and this one come first.
        for earlier in range(plan.prepared, number):
            banks = _after_step(plan, earlier, layer, banks, original, statistics)
        given = plan.step_banks(number, banks)
        with calling(step.method, "sizes", place_of(given)):
            settings, _ = step.method.sizes(on_meta(given), step.options)
        with calling(step.method, "curve", place_of(given)):
            found_errors = step.method.curve(given, statistics, step.options)
            errors = dict(zip(settings, found_errors, strict=True))
            if not all(math.isfinite(error) and error >= 0 for error in errors.values()):
                raise ValueError(f"errors {list(errors.values())}: not finite, or negative")
        own = _falling([errors[setting] for setting in curve.settings])
        if whole is None:  # scores of one method: they are in one unit as they are
            found[_key(curve)] = {"error": own, "raw": own}
            continue
        middle = _middle(curve, own, plan)
        setting = curve.settings[middle]
        terms = apply_step(step, names, banks, original, statistics, setting)
        replaced = {**before, **banks}
        for name, new in terms.items():
            replaced[name] = replace(before[name], terms=new)
        measured = whole.layer_error(whole.whole_modules(replaced, set(names)))
        rate = measured / own[middle] if own[middle] > 0 else 0.0
        found[_key(curve)] = {"error": _falling([rate * e for e in own]), "raw": own}
    return found


def _after_step(
    plan: Plan, number: int, layer: int, banks: Banks, original: Banks, statistics: Any
) -> Banks:
    """The banks after a step whose size the recipe states; auto steps leave them as they are."""
    step = plan.recipe.steps[number]
    now = dict(banks)
    for names in plan.groups(number, layer):
        if step.auto or not set(names) <= set(banks):
            continue
        size = plan.setting(number, layer, names)
        if plan.passes_over(number, size):
            continue
        for name, terms in apply_step(step, names, now, original, statistics, size).items():
            now[name] = replace(now[name], terms=terms)
    return now


def _middle(curve: SizeCurve, errors: list[float], plan: Plan) -> int:
    """The setting nearest to the mean size that the budget allows, below dense.

    A smaller one where nothing is lost at that size: an exchange rate needs something to exchange.
    """
    total = sum(c.cost[-1] for c in plan.curves)
    share = (plan.budget or 0) / total
    last = len(curve.settings) - (2 if curve.settings[-1] == DENSE else 1)
    middle = max(0, min(last, bisect_right(curve.cost, share * curve.cost[-1]) - 1))
    while middle > 0 and errors[middle] <= 0:
        middle -= 1
    return middle


def _falling(errors: list[float]) -> list[float]:
    """Removes rounding's tiny rises from a curve that falls by construction."""
    floor = float("inf")
    out = []
    for error in errors:
        floor = min(floor, max(error, 0.0))
        out.append(floor)
    return out
