"""The second half of a run: each layer is read once, rewritten for every run, and written at once.

Layers do not depend on each other here, and whatever a method needs is in the statistics; but for
sequential runs, whose statistics are taken here on what their own layers pass on (`sequential`).
Along the way the first calibration sequence goes through the layers as they will be stored; what it
gives at the end is what the gate holds the written files against.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..evaluate.loading import free_memory
from ..files import write_tensors
from ..linalg import remembered
from ..models import BankSite, installed, read_banks
from ..planning import TRACE_TOKENS, Plan, Size, check_kept
from ..statistics import ExpertFrequency, LayerSamples, LayerStatistics, RoutedOutputs
from ..sweep import LayerCall, Passed, StreamedModel
from ..terms import Bank
from .fate import Fate, alive
from .passes import run_passes
from .prepare import Preparation
from .progress import Reporter
from .sequential import CompressedPrefix, OriginalStream, Tokens, prefix_store
from .shards import cast_terms, describe, only_fewer, relative_weight_error, write_layer
from .trace import LayerOriginal, LayerTrace, kept_samples
from .workspace import Workspace

if TYPE_CHECKING:
    from ..registry import Registry


DIRECTIONS_SHARE = 0.25  # of the free memory; where it does not do, they are computed again


@dataclass
class Run:
    """One recipe at work.

    Attributes:
        plan: Its plan.
        workspace: Its directory.
        fate: Whether it has failed.
        sizes: Every step's size on every bank, once decided.
        preparation: Its statistics and prepared layers; None if there is no calibration text.
        hidden: The gate's sequence after the layers that are done.
        prefix: The calibration's, of a run whose statistics are those of its compressed layers.
    """

    plan: Plan
    workspace: Workspace
    fate: Fate
    sizes: Size = field(default_factory=dict)
    preparation: Preparation | None = None
    hidden: Passed | None = None
    prefix: CompressedPrefix | None = None

    @property
    def output(self) -> Path:
        """The checkpoint's directory."""
        return self.workspace.output

    def hidden_path(self, layer: int) -> Path:
        """Where the gate's hidden states that enter a layer are kept."""
        return self.workspace.state / f"gate-{layer:05d}.safetensors"

    def finished_layers(self, count: int) -> int:
        """How many layers, from the first, are written and intact, with the gate's states."""
        done = 0
        while done < count and self.workspace.record(done) is not None:
            done += 1
        while done and not self._goes_on_from(done, count):
            done -= 1
        return done

    def _goes_on_from(self, layer: int, count: int) -> bool:
        """Whether what enters a layer is there, of the gate and of the calibration if needed."""
        last = max(self.plan.recollected, default=-1)
        kept = layer > last or prefix_store(self.workspace.state, count).has(layer)
        return kept and self.hidden_path(layer).exists()


@dataclass(frozen=True)
class Sample:
    """Sequences that measure: the trace's, and the gate's which is the first.

    Attributes:
        ids: Token ids [1, T] of the gate's sequence.
        gate: Per layer, what the layer is passed for that sequence.
        traced: Per layer, what it is passed for all traced sequences at once.
        entering: What enters layer 0 of the gate's sequence.
    """

    ids: torch.Tensor
    gate: list[LayerCall]
    traced: list[LayerCall]
    entering: Passed


def prepare_sample(model: StreamedModel, ids: torch.Tensor) -> Sample:
    """Embeds the sequences that measure.

    Args:
        model: The streamed model; embeddings and head stay loaded afterwards.
        ids: Calibration sequences [N, T].
    """
    model.load_outer()
    count = min(ids.shape[0], -(-TRACE_TOKENS // ids.shape[1]))
    entering, gate = model.embed(ids[:1])
    _, traced = model.embed(ids[:count])
    return Sample(ids[:1], gate, traced, entering)


class LiveLayer:
    """A filled layer that all runs work on, and what is the same for all of them.

    Args:
        model: The original, streamed.
        index: The layer.
        module: It, its weights loaded.
        sites: Its bank sites.
        sample: The sequences that measure.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        module: nn.Module,
        sites: dict[str, BankSite],
        sample: Sample,
    ) -> None:
        self.model, self.index, self.module, self.sites = model, index, module, sites
        self.sample = sample
        self.banks = read_banks(module, index)
        self._original: LayerOriginal | None = None

    def trace(self, statistics: LayerStatistics) -> LayerTrace | None:
        """A run's trace, where it touches the layer and there are samples of what enters that."""
        if LayerSamples(TRACE_TOKENS) not in statistics:
            return None
        return LayerTrace(self.original(statistics))

    def original(self, statistics: LayerStatistics) -> LayerOriginal:
        """What the layer does in the original, by the samples of what enters it."""
        if self._original is None:
            self._original = LayerOriginal(
                self.model,
                self.index,
                self.module,
                self.sites,
                self.banks,
                kept_samples(statistics),
                self.sample.traced[self.index],
            )
        return self._original


def compress(
    model: StreamedModel,
    runs: list[Run],
    sample: Sample,
    tokens: Tokens | None,
    reporter: Reporter,
    registry: Registry,
) -> None:
    """Rewrites and writes all layers of all runs, each layer read once.

    Args:
        model: The original, streamed.
        runs: The runs, sizes decided.
        sample: The sequences that measure.
        tokens: All calibration tokens, for sequential runs; None without calibration.
        reporter: Progress.
        registry: The plugins; `layer_done` is called for each layer of each run.
    """
    count = len(model.layers)
    starts = {id(run): run.finished_layers(count) for run in runs}
    for run in runs:
        with run.fate.own():
            _begin(run, model, starts[id(run)], sample, tokens)
    stream = _stream(model, alive(runs), starts, tokens)
    first = min(starts.values(), default=count)
    if first:
        reporter.say(f"going on from layer {first} of {count}")
    with reporter.phase("compress", count - first):
        for index in range(first, count):
            started = time.perf_counter()
            errors: list[tuple[float, str]] = []
            working = [run for run in alive(runs) if starts[id(run)] <= index]
            if not working:
                continue
            several = len(working) > 1  # a lone run cuts each matrix once
            with (
                model.layer(index) as module,
                remembered(room_for_directions(module, model.device, 2) if several else 0),
            ):
                sites = working[0].plan.sites[index]
                layer = LiveLayer(model, index, module, sites, sample)
                reference = stream.visit(index, module, sites) if stream is not None else None
                for done, run in enumerate(working):
                    if several:
                        reporter.progress(f"layer {index}, {run.output.name}", done, len(working))
                    with run.fate.own():
                        found = _layer(run, layer, reference)
                        errors += [(error, run.output.name) for error in found]
                        registry.call("layer_done", run=run, layer=index)
            if stream is not None:
                stream.done(index)
            for run in alive(working):
                log = run.workspace.output / "run.log"
                for said in run.workspace.manifest["layers"][str(index)]["notes"]:
                    reporter.detail(f"layer {index}, {said['step']}: {said['text']}", log)
            elapsed = time.perf_counter() - started
            reporter.step(f"layer {index} in {elapsed:.1f} s{_span(errors)}")


def room_for_directions(layer: nn.Module, device: torch.device, runs: int) -> int:
    """Bytes that decompositions may hold while a layer is in memory, to be found again.

    However much is free, a lone run takes as much as the layer in float64, which plans count; there
    each bank is done with before the next. A set takes as much again.
    """
    weights = 8 * sum(parameter.numel() for parameter in layer.parameters())
    return min(min(runs, 2) * weights, int(DIRECTIONS_SHARE * free_memory(str(device))))


def _span(errors: list[tuple[float, str]]) -> str:
    """The layer error of one run, or the least and largest of several, for the log."""
    if not errors:
        return ""
    (low, first), (high, last) = min(errors), max(errors)
    if len(errors) == 1:
        return f", layer error {low:.2e}"
    return f", layer error {low:.2e} ({first}) to {high:.2e} ({last})"


def _begin(
    run: Run, model: StreamedModel, start: int, sample: Sample, tokens: Tokens | None
) -> None:
    """Takes up a run's hidden states where it begins or goes on."""
    run.hidden = _gate_states(run, start, sample)
    if run.plan.recollected:
        assert run.preparation is not None and tokens is not None  # needs imply a calibration
        run.prefix = CompressedPrefix(model, run.preparation, tokens, run.workspace.state)
        run.prefix.begin(start)


def _stream(
    model: StreamedModel, runs: list[Run], starts: dict[int, int], tokens: Tokens | None
) -> OriginalStream | None:
    """The original's hidden states, if statistics of any run compare with what they give."""
    needs: dict[int, list[RoutedOutputs]] = {}
    asking = []
    for run in runs:
        for layer, wanted in run.plan.recollected.items():
            own = [need for need in wanted if isinstance(need, RoutedOutputs)]
            if own and layer >= starts[id(run)]:
                needs.setdefault(layer, []).extend(own)
                asking.append(run)
    if not needs:
        return None
    assert tokens is not None
    stream = OriginalStream(model, tokens, asking[0].workspace.state, needs)
    stream.begin(min(starts[id(run)] for run in asking))
    return stream


def _gate_states(run: Run, layer: int, sample: Sample) -> Passed:
    from safetensors.torch import load_file

    if layer == 0:
        return sample.entering
    return Passed.of(load_file(str(run.hidden_path(layer))), "hidden")


def _layer(run: Run, layer: LiveLayer, reference: torch.Tensor | None) -> list[float]:
    """One run's passes on one filled layer; returns the layer's error if that was measured."""
    started = time.perf_counter()
    plan, preparation = run.plan, run.preparation
    index, module, model, banks = layer.index, layer.module, layer.model, layer.banks
    needs = plan.needs.get(index, [])
    original = own = LayerStatistics(index, {}, layer.sites)
    prepared = None
    if preparation is not None:
        original = own = preparation.statistics(index)
        prepared = preparation.banks(index, banks)
    if run.prefix is not None:
        own = run.prefix.statistics(index, module, reference)
    trace = layer.trace(original)
    after = trace.after if trace else _untraced
    notes = preparation.notes(index) if preparation is not None else []
    now, rewritten = run_passes(
        plan, run.sizes, index, banks, own.bind(module), after, prepared=prepared, notes=notes
    )
    check_kept(plan, now)
    stored = cast_terms(plan, index, now, rewritten)
    keep_form = only_fewer(plan, run.sizes, index, now, banks)
    if trace and rewritten:
        trace.after("as stored", sorted(rewritten), {**now, **stored})
    record = write_layer(plan, run.output, index, module, stored, keep_form)
    record["banks"] = {
        name: {
            "summary": describe(bank),
            "original": bank.shape.parameters,
            "parameters": bank.parameters(),
            "bytes": bank.nbytes(),
            "relative_weight_error": (
                None
                if (name in trace.moved if trace else _merged(plan, index, name))
                or (record["kept"] and "experts." in name)
                else relative_weight_error(bank, banks[name])
            ),
        }
        for name, bank in stored.items()
        if name in rewritten
    }
    record["trace"] = trace.rows if trace else []
    record["notes"] = notes
    if ExpertFrequency() in needs:
        record["tokens_per_expert"] = original[ExpertFrequency()].tolist()
    assert run.hidden is not None
    with installed(module, stored, model.dtype, keep_form), torch.no_grad():
        entering = run.hidden.to(model.device)
        run.hidden = model.run_layer(index, entering, layer.sample.gate[index])
        if run.prefix is not None:
            run.prefix.leave(index)
    write_tensors(run.hidden_path(index + 1), run.hidden.tensors("hidden"))
    record["seconds"] = round(time.perf_counter() - started, 3)
    run.workspace.add_layer(index, record)
    run.hidden_path(index).unlink(missing_ok=True)
    if run.prefix is not None:
        run.prefix.done(index)
    return [row["layer_error"] for row in record["trace"][-1:]]


def _merged(plan: Plan, layer: int, name: str) -> bool:
    """Whether a merge worked on a bank: without a trace nobody knows if it moved neurons."""
    return any(
        step.stage == "merge" and name in targets.get(layer, ())
        for step, targets in zip(plan.recipe.steps, plan.targets, strict=True)
    )


def _untraced(step: str, names: list[str], banks: dict[str, Bank]) -> None:
    """Without calibration text there is nothing to measure outputs on."""


def size_record(sizes: Size) -> list[list[Any]]:
    """Sizes as JSON."""
    return [[*key, value] for key, value in sizes.items()]


def size_from_record(record: list[list[Any]]) -> Size:
    """The inverse of `size_record`."""
    return {(step, layer, bank): value for step, layer, bank, value in record}
