"""The forward sweep: calibration tokens go through the model layer by layer.

The hidden states of all batches enter layer i, whoever listens sees them pass, and they leave for
layer i+1; one layer's weights are in memory. The first batch also goes through the model's own
forward at the same time, layer by layer, and must arrive everywhere with the same bits: what a
family hands on from layer to layer and `wiring` has overlooked is found out here, not in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files import write_tensors
from .boundaries import BoundaryStore
from .passed import (
    LayerCall,
    Passed,
    batch_tensors,
    count_batches,
    read_batch,
    same_call,
    share_calls,
)
from .stream import StreamedModel


@dataclass(frozen=True)
class LayerVisit:
    """One layer during a sweep, its weights in memory.

    Attributes:
        index: The layer's number.
        module: The layer, filled.
        inputs: Hidden states [B, T, H] that enter it, one entry a batch (on the CPU).
        more: What enters it beside them, as `Passed` names it, one entry a batch.
        run: Runs the layer on batch number b and returns its output [B, T, H] on the device; with
            False as second argument not for the next layer to see: the module is not the original.
    """

    index: int
    module: nn.Module
    inputs: list[torch.Tensor]
    more: list[dict[str, torch.Tensor]]
    run: Callable[..., torch.Tensor]


class ForwardSweep:
    """Calibration tokens on their way through a streamed model.

    Args:
        model: The streamed model.
        ids: Token ids [N, T].
        batch: Sequences per forward pass.
        state: File that keeps the hidden states after each layer, so that a killed sweep goes on;
            None to keep nothing.
        boundaries: Is given what enters each layer, for a sweep back; None if there will be none.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        batch: int,
        state: Path | None = None,
        boundaries: BoundaryStore | None = None,
    ) -> None:
        self.model = model
        self.batches = list(ids.split(batch))
        self.state = state
        self.boundaries = boundaries

    def run(
        self, visit: Callable[[LayerVisit], list[torch.Tensor]], start: int = 0
    ) -> list[Passed]:
        """Visits every layer from `start` on.

        Args:
            visit: Is called with each layer; returns its outputs, one a batch.
            start: The first layer to visit; above 0 the sweep's state file must hold what enters
                it, and the boundaries below must have been kept.

        Returns:
            What the last layer passes on, one entry a batch, on the CPU.

        Raises:
            UserError: The layers' results do not add up to the model's own forward.
        """
        model = self.model
        if self.boundaries is not None and not self.boundaries.complete(start):
            raise ValueError(f"{self.boundaries.directory}: lacks boundaries below layer {start}")
        _ = model.wiring  # what cannot be streamed is refused before anything is read
        model.load_outer()
        entering, calls = embed_batches(model, self.batches)
        if start:
            entering = self._resume(start)
        # The model's own forward on the first batch drives the sweep: each layer is filled just
        # before its call and emptied after it.
        done: list[Passed] = entering

        def drive(index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
            nonlocal done
            if index < start:
                first = entering[0].to(model.device)
                return model.answer(index, hidden, call, first, start)
            first = done[0].to(model.device)
            self._compare(index, hidden, call, *model.arrive(index, first, calls[0][index]))
            with model.layer(index) as module, torch.no_grad():
                own = type(module).forward(module, hidden, *call.args, **call.kwargs)
                model.leave(index, first, call, own)  # it must be such as can be carried on
                self._compare_again(index, call, model.arrive(index, first, calls[0][index])[1])
                self._keep(index, done)
                done = self._visit(index, module, visit, done, calls)
            self._save(index + 1, done)
            return own

        with model.replaced(drive):
            logits = model._forward(self.batches[0])
        streamed = model.head(self.batches[0], done[0].to(model.device))
        if not torch.equal(logits, streamed):
            self._check_finite(logits, "the logits are")
            raise UserError(
                f"{type(model.model).__name__}: streaming its layers does not give the model's own "
                "logits; the family is not supported"
            )
        self._keep(len(model.layers), done)
        return done

    def _visit(
        self,
        index: int,
        module: nn.Module,
        visit: Callable[[LayerVisit], list[torch.Tensor]],
        entering: list[Passed],
        calls: list[list[LayerCall]],
    ) -> list[Passed]:
        """One visit to a filled layer; what it passes on, on the CPU."""
        model = self.model
        inputs = [passed.hidden for passed in entering]
        more = [passed.more for passed in entering]
        entering.clear()  # the visit frees inputs as it uses them
        leaving: dict[int, dict[str, torch.Tensor]] = {}

        def run(b: int, as_original: bool = True) -> torch.Tensor:
            passed = Passed(inputs[b], more[b]).to(model.device)
            output = model.run_layer(index, passed, calls[b][index])
            if as_original:
                leaving[b] = {name: tensor.cpu() for name, tensor in output.more.items()}
            return output.hidden

        outputs = visit(LayerVisit(index, module, inputs, more, run))
        return [Passed(hidden.cpu(), leaving[b]) for b, hidden in enumerate(outputs)]

    def _keep(self, layer: int, passed: list[Passed]) -> None:
        # Before the visit, which may free the inputs as it uses them.
        if self.boundaries is not None and self.boundaries.keeps(layer):
            self.boundaries.put(layer, passed)

    def _compare(
        self,
        index: int,
        own: torch.Tensor,
        own_call: LayerCall,
        ours: torch.Tensor,
        call: LayerCall,
    ) -> None:
        """The model's own forward must reach layer `index` with what the sweep has for it."""
        equal = torch.equal(own, ours)
        if equal and same_call(own_call, call):
            return
        self._check_finite(own, f"what enters layer {index} is")
        what = "arguments" if equal else "hidden states"
        raise UserError(
            f"{type(self.model.model).__name__}: layer {index} gets other {what} in the model's "
            "own forward than when streamed; the family is not supported"
        )

    def _compare_again(self, index: int, own: LayerCall, ours: LayerCall) -> None:
        """A layer that has run must have left its arguments as they were, but for shared ones."""
        shared = self.model.wiring.shared
        if not same_call(own.without(shared), ours.without(shared)):
            raise UserError(
                f"{type(self.model.layers[index]).__name__}: layer {index} changes what it is "
                "passed beside hidden states, for other layers to see; not supported"
            )

    def _check_finite(self, values: torch.Tensor, what: str) -> None:
        """NaN is equal to nothing: it must not be taken for a family that cannot be streamed."""
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"{type(self.model.model).__name__}: {what} not finite in {self.model.dtype}; try "
                "another dtype"
            )

    def _save(self, index: int, passed: list[Passed]) -> None:
        if self.state is not None:
            write_tensors(self.state, batch_tensors(passed), {"layer": str(index)})

    def _resume(self, start: int) -> list[Passed]:
        from safetensors import safe_open

        with safe_open(str(self.state), framework="pt", backend="pread") as file:
            if (file.metadata() or {}).get("layer") != str(start):
                raise ValueError(f"{self.state} does not hold the states that enter layer {start}")
            return [read_batch(file, b) for b in range(len(self.batches))]

    def saved_layer(self) -> int:
        """The layer that the saved hidden states enter; 0 if there are none that can be read."""
        if self.state is None or not self.state.exists():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.state), framework="pt", backend="pread") as file:
                layer = int((file.metadata() or {}).get("layer", "0"))
                return layer if count_batches(file) == len(self.batches) else 0
        except (OSError, SafetensorError, ValueError):
            return 0


def embed_batches(
    model: StreamedModel, batches: list[torch.Tensor]
) -> tuple[list[Passed], list[list[LayerCall]]]:
    """What enters layer 0, one entry a batch on the CPU, and what else layers are passed."""
    passed: list[Passed] = []
    calls: list[list[LayerCall]] = []
    for ids in batches:
        states, layer_calls = model.embed(ids)
        passed.append(states.cpu())
        calls.append(share_calls(layer_calls, calls[0] if calls else None))
    return passed, calls


def stream_logits(
    model: StreamedModel,
    ids: torch.Tensor,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Logits of many sequences with one decoder layer in memory at a time.

    Args:
        model: The streamed model.
        ids: Token ids [N, T].
        batch_size: Sequences per forward pass.
        progress: Is called with (layers done, layers in all).

    Yields:
        Logits [B, T, V] of each batch, in order.
    """
    sweep = ForwardSweep(model, ids, batch_size)

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        outputs = []
        for b in range(len(layer.inputs)):
            outputs.append(layer.run(b).cpu())
            layer.inputs[b] = outputs[-1][:0]  # each input is used once: free it at once
        if progress:
            progress(layer.index + 1, len(model.layers))
        return outputs

    for batch, passed in zip(sweep.batches, sweep.run(visit), strict=True):
        yield model.head(batch, passed.to(model.device))
