"""The second half of a run: each layer is read once, rewritten for every run, and written at once.

Layers do not depend on each other here (`propagate: original`): whatever a method needs is in the
statistics. Along the way the first calibration sequence goes through the layers as they will be
stored; what it gives at the end is what the gate holds the written files against.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files import write_tensors
from ..models import installed, read_banks
from ..plan import TRACE_TOKENS, Plan, Size
from ..statistics import ExpertFrequency, LayerSamples, LayerStatistics
from ..sweep import LayerCall, StreamedModel
from ..terms import Bank
from .passes import run_passes
from .prepare import Preparation
from .progress import Reporter
from .shards import cast_terms, describe, relative_weight_error, write_layer
from .trace import LayerTrace
from .workspace import Workspace

if TYPE_CHECKING:
    from ..registry import Registry


@dataclass
class Run:
    """One recipe at work.

    Attributes:
        plan: Its plan.
        workspace: Its directory.
        sizes: Every step's size on every bank, once decided.
        preparation: Its statistics and prepared layers; None if there is no calibration text.
        hidden: The gate's sequence [1, T, H] after the layers that are done.
    """

    plan: Plan
    workspace: Workspace
    sizes: Size = field(default_factory=dict)
    preparation: Preparation | None = None
    hidden: torch.Tensor | None = None

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
        while done and not self.hidden_path(done).exists():
            done -= 1
        return done


@dataclass(frozen=True)
class Sample:
    """Sequences that measure: the trace's, and the gate's which is the first.

    Attributes:
        ids: Token ids [1, T] of the gate's sequence.
        calls: Per traced sequence, per layer, what the layer is passed.
        entering: The gate's hidden states [1, T, H] that enter layer 0.
    """

    ids: torch.Tensor
    calls: list[list[LayerCall]]
    entering: torch.Tensor


def prepare_sample(model: StreamedModel, ids: torch.Tensor) -> Sample:
    """Embeds the sequences that measure.

    Args:
        model: The streamed model; embeddings and head stay loaded afterwards.
        ids: Calibration sequences [N, T].
    """
    model.load_outer()
    count = min(ids.shape[0], -(-TRACE_TOKENS // ids.shape[1]))
    calls = []
    entering = None
    for sequence in ids[:count].split(1):
        hidden, layer_calls = model.embed(sequence)
        entering = hidden if entering is None else entering
        calls.append(layer_calls)
    assert entering is not None
    return Sample(ids[:1], calls, entering)


def compress(
    model: StreamedModel,
    runs: list[Run],
    sample: Sample,
    reporter: Reporter,
    registry: Registry,
) -> None:
    """Rewrites and writes all layers of all runs, each layer read once.

    Args:
        model: The original, streamed.
        runs: The runs, sizes decided.
        sample: The sequences that measure.
        reporter: Progress.
        registry: The plugins; `layer_done` is called for each layer of each run.
    """
    count = len(model.layers)
    starts = {id(run): run.finished_layers(count) for run in runs}
    for run in runs:
        run.hidden = _gate_states(run, starts[id(run)], sample)
    first = min(starts.values())
    if first:
        reporter.say(f"going on from layer {first} of {count}")
    with reporter.phase("compress", count - first):
        for index in range(first, count):
            started = time.perf_counter()
            notes = []
            with model.layer(index) as module:
                for run in runs:
                    if starts[id(run)] <= index:
                        notes.append(_layer(run, model, index, module, sample))
                        registry.hook.layer_done(run=run, layer=index)
            elapsed = time.perf_counter() - started
            reporter.step(f"layer {index} in {elapsed:.1f} s{''.join(notes)}")


def _gate_states(run: Run, layer: int, sample: Sample) -> torch.Tensor:
    from safetensors.torch import load_file

    if layer == 0:
        return sample.entering
    return load_file(str(run.hidden_path(layer)))["hidden"]


def _layer(
    run: Run,
    model: StreamedModel,
    index: int,
    module: nn.Module,
    sample: Sample,
) -> str:
    """One run's passes on one filled layer; returns a note for the log."""
    started = time.perf_counter()
    plan, preparation = run.plan, run.preparation
    banks = read_banks(module, index)
    needs = plan.needs.get(index, [])
    statistics = (
        preparation.statistics(index)
        if preparation is not None
        else LayerStatistics(index, {}, plan.sites[index])
    )
    prepared = preparation.banks(index, banks) if preparation is not None else None
    trace = _trace(model, index, module, sample, statistics, plan, banks)
    after = trace.after if trace else _untraced
    now, rewritten = run_passes(plan, run.sizes, index, banks, statistics, after, prepared=prepared)
    stored = cast_terms(plan, index, now, rewritten)
    if trace and rewritten:
        trace.after("as stored", sorted(rewritten), {**now, **stored})
    record = write_layer(plan, run.output, index, module, stored)
    record["banks"] = {
        name: {
            "summary": describe(bank),
            "parameters": bank.parameters(),
            "bytes": bank.nbytes(),
            "relative_weight_error": (
                None if trace and name in trace.moved else relative_weight_error(bank, banks[name])
            ),
        }
        for name, bank in stored.items()
        if name in rewritten
    }
    record["trace"] = trace.rows if trace else []
    if ExpertFrequency() in needs:
        record["tokens_per_expert"] = statistics[ExpertFrequency()].tolist()
    assert run.hidden is not None
    with installed(module, stored, model.dtype), torch.no_grad():
        run.hidden = model.run_layer(index, run.hidden.to(model.device), sample.calls[0][index])
    write_tensors(run.hidden_path(index + 1), {"hidden": run.hidden})
    record["seconds"] = round(time.perf_counter() - started, 3)
    run.workspace.add_layer(index, record)
    run.hidden_path(index).unlink(missing_ok=True)
    last = record["trace"][-1] if record["trace"] else None
    return f", layer error {last['layer_error']:.2e}" if last else ""


def _trace(
    model: StreamedModel,
    index: int,
    module: nn.Module,
    sample: Sample,
    statistics: LayerStatistics,
    plan: Plan,
    banks: dict[str, Bank],
) -> LayerTrace | None:
    """A trace where the layer is touched and there are samples of what enters it."""
    need = LayerSamples(TRACE_TOKENS)
    if need not in statistics:
        return None
    samples = statistics[need]
    calls = [calls[index] for calls in sample.calls]
    return LayerTrace(model, index, module, plan.sites[index], banks, samples, calls)


def _untraced(step: str, names: list[str], banks: dict[str, Bank]) -> None:
    """Without calibration text there is nothing to measure outputs on."""


def size_record(sizes: Size) -> list[list[Any]]:
    """Sizes as JSON."""
    return [[*key, value] for key, value in sizes.items()]


def size_from_record(record: list[list[Any]]) -> Size:
    """The inverse of `size_record`."""
    return {(step, layer, bank): value for step, layer, bank, value in record}
