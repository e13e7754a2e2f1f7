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
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import write_json
from ..models import read_banks
from ..plan import TRACE_TOKENS, Plan
from ..statistics import LayerSamples
from ..sweep import StreamedModel
from ..terms import DENSE, SizeCurve
from .compress import Sample
from .passes import Banks, apply_step
from .prepare import Preparation
from .prepared import on_meta
from .progress import Reporter
from .trace import LayerOriginal

Errors = dict[str, list[float]]  # "error" and "raw" of a `SizeCurve`


def measure_curves(
    preparation: Preparation,
    model: StreamedModel,
    sample: Sample,
    path: Path,
    reporter: Reporter,
) -> list[SizeCurve]:
    """Computes the curves of all auto items, a layer in memory at a time.

    Args:
        preparation: The run's plan, statistics and prepared layers.
        model: The original, streamed; embeddings loaded.
        sample: The sequences that measure.
        path: JSON file that keeps the finished layers' curves for a resumed run.
        reporter: Progress.
    """
    plan = preparation.plan
    known: dict[str, Errors] = json.loads(path.read_text()) if path.exists() else {}
    by_layer: dict[int, list[SizeCurve]] = {}
    for curve in plan.curves:
        by_layer.setdefault(curve.item[1], []).append(curve)
    missing = {
        layer: curves
        for layer, curves in by_layer.items()
        if any(_key(curve) not in known for curve in curves)
    }
    with reporter.phase("size curves", len(missing)):
        for layer, curves in missing.items():
            known |= _layer_curves(preparation, model, sample, layer, curves)
            write_json(path, known)
            reporter.step(f"layer {layer}")
    return [
        replace(
            curve,
            error=tuple(known[_key(curve)]["error"]),
            raw=tuple(known[_key(curve)]["raw"]),
        )
        for curve in plan.curves
    ]


def _key(curve: SizeCurve) -> str:
    step, layer, banks = curve.item
    return f"{layer}.{banks}.{step}"


def _layer_curves(
    preparation: Preparation,
    model: StreamedModel,
    sample: Sample,
    layer: int,
    curves: list[SizeCurve],
) -> dict[str, Errors]:
    """The errors of one layer's auto items, in the common unit and as their methods give them."""
    plan = preparation.plan
    sites = plan.sites[layer]
    found: dict[str, Errors] = {}
    with model.layer(layer) as module:
        original = read_banks(module, layer)
        statistics = preparation.statistics(layer).bind(module)
        whole: LayerOriginal | None = None
        if plan.recipe.allocate is None or plan.recipe.allocate.method.units != "score":
            samples = statistics[LayerSamples(TRACE_TOKENS)]
            whole = LayerOriginal(
                model, layer, module, sites, original, samples, sample.traced[layer]
            )
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
            settings, _ = step.method.sizes(on_meta(given), step.options)
            errors = dict(
                zip(settings, step.method.curve(given, statistics, step.options), strict=True)
            )
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
