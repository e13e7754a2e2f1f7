"""Size curves with errors: every auto bank's, in one unit, from the layers' statistics.

A method's curve is the squared error of its bank's output. Banks differ in what such an error does
to the layer, so each curve is put into one unit, the relative squared error of the layer's output,
by a measured exchange rate: the bank alone is compressed to a middling size, the layer's error is
measured on the kept sample, and divided by what the curve says at that size.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path

from ..files import write_json
from ..models import read_banks
from ..plan import TRACE_TOKENS, Plan
from ..statistics import LayerSamples, StatisticsCache
from ..sweep import StreamedModel
from ..terms import DENSE, Bank, Bias, SizeCurve
from .calibrate import layer_statistics
from .compress import Sample
from .passes import weights_of
from .progress import Reporter
from .trace import LayerTrace


def measure_curves(
    plan: Plan,
    model: StreamedModel,
    sample: Sample,
    cache: StatisticsCache,
    path: Path,
    reporter: Reporter,
) -> list[SizeCurve]:
    """Computes the curves of all auto banks, a layer in memory at a time.

    Args:
        plan: The run's plan.
        model: The original, streamed; embeddings loaded.
        sample: The sequences that measure.
        cache: The statistics.
        path: JSON file that keeps the finished layers' curves for a resumed run.
        reporter: Progress.
    """
    known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    by_layer: dict[int, list[SizeCurve]] = {}
    for curve in plan.curves:
        by_layer.setdefault(curve.item[0], []).append(curve)
    missing = {
        layer: curves
        for layer, curves in by_layer.items()
        if any(_key(curve) not in known for curve in curves)
    }
    with reporter.phase("size curves", len(missing)):
        for layer, curves in missing.items():
            known |= _layer_curves(plan, model, sample, cache, layer, curves)
            write_json(path, known)
            reporter.step(f"layer {layer}")
    return [
        SizeCurve(curve.item, curve.settings, curve.cost, tuple(known[_key(curve)]))
        for curve in plan.curves
    ]


def _key(curve: SizeCurve) -> str:
    return f"{curve.item[0]}.{curve.item[1]}"


def _layer_curves(
    plan: Plan,
    model: StreamedModel,
    sample: Sample,
    cache: StatisticsCache,
    layer: int,
    curves: list[SizeCurve],
) -> dict[str, list[float]]:
    """The errors of one layer's auto banks."""
    sites = plan.sites[layer]
    found: dict[str, list[float]] = {}
    with model.layer(layer) as module:
        banks = read_banks(module, layer)
        statistics = layer_statistics(cache, layer, plan.needs[layer], sites)
        samples = statistics[LayerSamples(TRACE_TOKENS)]
        calls = [calls[layer] for calls in sample.calls]
        trace = LayerTrace(model, layer, module, sites, banks, samples, calls)
        for curve in curves:
            name = curve.item[1]
            step = next(
                step
                for number, step in enumerate(plan.recipe.steps)
                if step.auto and name in plan.targets[number].get(layer, ())
            )
            weights = weights_of(banks[name])
            settings, _ = step.method.sizes(sites[name].shape, step.options)
            errors = dict(
                zip(settings, step.method.curve(weights, statistics, step.options), strict=True)
            )
            own = [errors[setting] for setting in curve.settings]
            middle = _middle(curve, own, plan)
            terms = step.method.decompose(weights, statistics, curve.settings[middle], step.options)
            biases = [term for term in banks[name].terms if isinstance(term, Bias)]
            replaced = {**banks, name: Bank(name, layer, sites[name].shape, [*terms, *biases])}
            measured = trace.layer_error(trace.whole_modules(replaced, {name}))
            rate = measured / own[middle] if own[middle] > 0 else 0.0
            found[_key(curve)] = _falling([rate * error for error in own])
    return found


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
