"""Measures what prepared steps left: the statistics `of="current"`.

In a forward sweep after those steps, the original's hidden states entering every layer as before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..models import installed, neighbours, read_banks
from ..statistics import LayerCollector, Need
from ..sweep import ForwardSweep, LayerVisit
from .passes import Banks
from .prepare import Preparation
from .progress import Reporter

if TYPE_CHECKING:
    from ..sweep import StreamedModel


def measure_current(
    model: StreamedModel,
    preparations: list[Preparation],
    ids: torch.Tensor,
    batch: int,
    reporter: Reporter,
) -> int:
    """Measures statistics of what the prepared steps left, in one forward sweep.

    What enters every layer is the original's; the layer then runs as the prepared steps left it.

    Returns:
        The number of sweeps: 0 if everything was in the cache.
    """
    asked: dict[int, dict[Path, tuple[Preparation, list[Need]]]] = {}
    for preparation in preparations:
        for layer, needs in preparation.plan.needs.items():
            wanted = [
                need
                for need in needs
                if need.current and not preparation.cache_of(need, layer).has(need, layer)
            ]
            if wanted:
                assert preparation.store is not None
                # Runs with the same prepared layer ask once.
                path = preparation.store.path(layer)
                known = asked.setdefault(layer, {}).get(path, (preparation, []))[1]
                more = known + [need for need in wanted if need not in known]
                asked[layer][path] = (preparation, more)
    if not asked:
        return 0
    sweep = ForwardSweep(model, ids, batch)

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for preparation, needs in asked.get(layer.index, {}).values():
            found = _measure_layer(model, layer, preparation, needs)
            outputs = outputs or found
        for b in range(len(layer.inputs) if not outputs else 0):
            outputs.append(layer.run(b).cpu())
            layer.inputs[b] = outputs[-1][:0]  # used: free it
        reporter.step(f"layer {layer.index}")
        return outputs

    with reporter.phase("moments", len(model.layers)):
        sweep.run(visit)
    return 1


def _measure_layer(
    model: StreamedModel, layer: LayerVisit, preparation: Preparation, needs: list[Need]
) -> list[torch.Tensor]:
    """One prepared layer's statistics, into the cache.

    Returns:
        The layer's outputs if it ran as the original, nothing otherwise.
    """
    index, outputs = layer.index, []
    with prepared_layer(model, layer.module, index, preparation) as (banks, as_original):
        sites = preparation.plan.sites[index]
        collector = LayerCollector(layer.module, index, sites, banks, needs, model.device)
        with collector.listening():
            for b in range(len(layer.inputs)):
                output = layer.run(b, as_original)
                if as_original:
                    outputs.append(output.cpu())
        result = collector.result()
    for need in needs:
        preparation.cache_of(need, index).put(need, index, result[need])
    return outputs


@contextlib.contextmanager
def prepared_layer(
    model: StreamedModel, module: nn.Module, index: int, preparation: Preparation
) -> Iterator[tuple[Banks, bool]]:
    """A layer in which what is left after the prepared steps can be measured.

    Where every neuron is in its place, what enters the matrices is what enters the original's: then
    the original layer runs. Otherwise the prepared one does.

    Yields:
        The banks after the prepared steps, and whether the original layer runs.
    """
    original = read_banks(module, index)
    store, prepared = preparation.store, preparation.banks(index, original)
    if store is None or prepared is None:
        yield original, True
        return
    banks, rewritten = prepared
    as_original = store.in_place(index)
    with contextlib.ExitStack() as stack:
        if not as_original:
            names = neighbours(preparation.plan.sites[index], rewritten)
            whole = {name: banks[name] for name in names}
            stack.enter_context(installed(module, whole, model.dtype))
        yield banks, as_original
