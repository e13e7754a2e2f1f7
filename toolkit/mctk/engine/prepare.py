"""Runs the prepared steps.

Squared gradients of a layer live for that layer only: the backward sweep goes from the last layer
to the first, and as soon as a layer's are complete the steps that need them run, for every run of
the set; what they make is kept (`prepared`). What is left can then be measured (`current`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..files import room_for
from ..models import read_banks
from ..statistics import (
    GradientCollector,
    LayerStatistics,
    Need,
    StatisticsCache,
)
from ..sweep import BackwardSweep, BackwardVisit, BoundaryStore
from .fate import Fate, alive
from .passes import Banks, Note, run_passes
from .prepared import PreparedStore
from .progress import Reporter

if TYPE_CHECKING:
    from ..planning import Plan
    from ..sweep import StreamedModel

FREE_SHARE = 0.9  # of the free disk, what hidden states may take


@dataclasses.dataclass
class Preparation:
    """One run's prepared layers and where its statistics lie.

    Attributes:
        plan: The run's plan.
        cache: Statistics of the original.
        store: The prepared layers; None if no step is prepared.
        fate: The run's.
    """

    plan: Plan
    cache: StatisticsCache
    store: PreparedStore | None
    fate: Fate

    @classmethod
    def of(cls, plan: Plan, cache: StatisticsCache, fate: Fate) -> Preparation:
        """The preparation of a run."""
        return cls(plan, cache, PreparedStore(plan, cache) if plan.prepared else None, fate)

    def cache_of(self, need: Need, layer: int) -> StatisticsCache:
        """The cache that holds a statistic of a layer."""
        if self.store is not None and need.current:
            return self.cache.derived(self.store.identity(layer))
        return self.cache

    def statistics(self, layer: int, values: dict[Need, Any] | None = None) -> LayerStatistics:
        """A layer's statistics, each read from its cache when a method asks for it.

        Args:
            layer: The layer.
            values: What is not in a cache: gradients, while they live.
        """
        found: dict[Need, Any] = dict(values or {})
        for need in self.plan.needs.get(layer, []):
            if need not in found and not need.transient:
                found[need] = partial(self.cache_of(need, layer).get, need, layer)
        return LayerStatistics(layer, found, self.plan.sites[layer])

    def banks(self, layer: int, original: Banks) -> tuple[Banks, set[str]] | None:
        """What the prepared steps made of a layer; None if there are none on it.

        Raises:
            UserError: It has gone from the cache.
        """
        if self.store is None or layer not in self.store.layers():
            return None
        try:
            return self.store.get(layer, original)
        except (OSError, ValueError) as error:
            self.store.path(layer).unlink(missing_ok=True)
            raise UserError(
                f"{self.store.path(layer)}: a prepared layer has gone or is damaged; run again"
            ) from error

    def missing(self) -> list[int]:
        """The layers whose prepared steps have not been run, in ascending order."""
        store = self.store
        return [] if store is None else [la for la in store.layers() if not store.has(la)]

    def make(self, layer: int, module: nn.Module, banks: Banks, values: dict[Need, Any]) -> None:
        """Runs the prepared steps on a filled layer and keeps what they make."""
        assert self.store is not None
        notes: list[Note] = []
        now, rewritten = run_passes(
            self.plan,
            self.plan.sizes(),
            layer,
            banks,
            self.statistics(layer, values).bind(module),
            lambda step, names, banks: None,
            stop=self.plan.prepared,
            notes=notes,
        )
        self.store.put(layer, banks, now, rewritten, notes)

    def notes(self, layer: int) -> list[Note]:
        """What the prepared steps said about their work on a layer."""
        store = self.store
        return store.notes(layer) if store is not None and layer in store.layers() else []

    def meta(self) -> dict[int, dict[str, Any]]:
        """Layer → bank → terms without data, of everything that was prepared."""
        store = self.store
        return {} if store is None else {layer: store.meta(layer) for layer in store.layers()}


def gradient_needs(preparation: Preparation) -> dict[int, list[Need]]:
    """By layer, the gradients that a run's missing prepared layers and its statistics ask for."""
    missing = set(preparation.missing())
    found: dict[int, list[Need]] = {}
    for layer, needs in preparation.plan.needs.items():
        for need in needs:
            wanted = layer in missing if need.transient else not preparation.cache.has(need, layer)
            if need.gradient and wanted:
                found.setdefault(layer, []).append(need)
    return found


def open_boundaries(
    preparations: list[Preparation], ids: torch.Tensor, state: Path
) -> BoundaryStore | None:
    """Room for what enters the layers of a forward sweep; None if no run needs gradients.

    Where the disk is short, only what enters every k-th layer is kept, with the least k that fits.

    Args:
        preparations: The runs.
        ids: Calibration sequences [N, T].
        state: Directory of the first run's state.

    Raises:
        UserError: Not even the fewest boundaries fit.
    """
    needs = [gradient_needs(preparation) for preparation in preparations]
    layers = [layer for wanted in needs for layer in wanted]
    if not layers:
        return None
    plan = preparations[0].plan
    model, directory = plan.model, state / "boundaries"
    asked = plan.recipe.calibration.keep_every if plan.recipe.calibration else None
    _, free = room_for(directory)
    count = len(model.layers)
    for every in range(1, count + 1) if asked is None else [min(asked, count)]:
        store = BoundaryStore(directory, count, every, min(layers))
        needed = store.nbytes(ids.numel(), model.wiring.passing())
        if asked is not None or needed <= FREE_SHARE * free:
            return store
    raise UserError(
        f"output: the hidden states that gradients need take {needed / 1e9:.1f} GB at least, and "
        f"{state} has {free / 1e9:.1f} GB free; choose an output on a larger disk, or fewer or "
        "shorter calibration sequences"
    )


def backward(
    model: StreamedModel,
    preparations: list[Preparation],
    ids: torch.Tensor,
    batch: int,
    boundaries: BoundaryStore,
    state: Path,
    reporter: Reporter,
) -> int:
    """Runs the backward sweeps that are needed, and in them the prepared steps.

    Args:
        model: The streamed model.
        preparations: The runs.
        ids: Calibration sequences [N, T].
        batch: Sequences per pass.
        boundaries: The hidden states that the forward sweep has kept.
        state: Directory for what a killed sweep goes on from.
        reporter: Progress.

    Returns:
        The number of sweeps.
    """
    sweeps = 0
    for labels in ("data", "model"):
        asking = [
            (preparation, wanted)
            for preparation in preparations
            if (wanted := _with_labels(gradient_needs(preparation), labels))
        ]
        if not asking:
            continue
        sweeps += 1
        stop = min(layer for _, wanted in asking for layer in wanted)
        count = len(model.layers)
        kept = state / f"gradients-{labels}.safetensors"
        sweep = BackwardSweep(
            model,
            ids,
            batch,
            boundaries,
            labels=labels,
            seed=asking[0][0].plan.recipe.seed,
            state=kept,
        )

        def visit(layer: BackwardVisit, asking: list[Any] = asking) -> None:
            _visit_backward(model, layer, asking, ids.shape[1])
            reporter.step(f"layer {layer.index}")

        start = sweep.saved_layer()
        if start is not None and any(layer >= start for _, wanted in asking for layer in wanted):
            # Saved gradients have passed a layer that is wanted: its result has gone since.
            kept.unlink()
            start = None
        with reporter.phase("gradients", (count if start is None else start) - stop):
            losses = sweep.run(visit, stop)
        reporter.say(f"loss on the calibration text: {sum(losses) / len(losses):.4f} per token")
        kept.unlink(missing_ok=True)
    return sweeps


def _with_labels(needs: dict[int, list[Need]], labels: str) -> dict[int, list[Need]]:
    chosen = {
        layer: [need for need in wanted if getattr(need, "labels", "data") == labels]
        for layer, wanted in needs.items()
    }
    return {layer: wanted for layer, wanted in chosen.items() if wanted}


def _visit_backward(
    model: StreamedModel,
    layer: BackwardVisit,
    asking: list[tuple[Preparation, dict[int, list[Need]]]],
    length: int,
) -> None:
    """One layer of a backward sweep: its gradients, then every run's prepared steps."""
    index = layer.index
    wanted: list[Need] = []
    for _, needs in asking:
        wanted += [need for need in needs.get(index, []) if need not in wanted]
    if not wanted:
        layer.run()
        return
    preparations = [p for p, needs in asking if index in needs]
    sites = preparations[0].plan.sites[index]
    collector = GradientCollector(layer.module, index, sites, wanted, length, model.device)
    with collector.listening():
        layer.run()
    values = dict(collector.result())
    banks = read_banks(layer.module, index)
    for need, value in values.items():
        if not need.transient:
            preparations[0].cache.put(need, index, value)
    for preparation in alive(preparations):
        # Another run of the set may have made the same one a moment ago.
        if preparation.store is not None and not preparation.store.has(index):
            with preparation.fate.own():
                preparation.make(index, layer.module, banks, values)


def without_gradients(
    model: StreamedModel, preparations: list[Preparation], reporter: Reporter
) -> None:
    """Runs prepared steps that need no gradients, a layer in memory at a time."""
    missing = {id(p): p.missing() for p in preparations}
    layers = sorted({layer for wanted in missing.values() for layer in wanted})
    if not layers:
        return
    with reporter.phase("prepare", len(layers)):
        for index in layers:
            with model.layer(index) as module:
                banks = read_banks(module, index)
                for preparation in alive(preparations):
                    store = preparation.store
                    # Another run of the set may have made the same one a moment ago.
                    if store and index in missing[id(preparation)] and not store.has(index):
                        with preparation.fate.own():
                            preparation.make(index, module, banks, {})
            reporter.step(f"layer {index}")
