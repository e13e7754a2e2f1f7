"""The backward sweep: gradients of the loss go back through the model, layer by layer.

What entered each layer was kept on disk by a forward sweep. From last to first a layer is loaded,
run again on that with gradients recorded, and the gradients of its outputs become those of its
inputs: one layer in memory, and the very numbers of a backward pass through the whole model.
Weights get no gradients here; whoever wants them listens (`statistics.GradientCollector`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..files import write_tensors
from ..models import gradients_enabled, has_expert_list
from .boundaries import BoundaryStore
from .forward import embed_batches
from .passed import LayerCall, Passed, batch_tensors, read_batch
from .stream import StreamedModel

IGNORED = -100
"""A label that is not counted, as in transformers."""


@dataclass(frozen=True)
class BackwardVisit:
    """One layer during the backward sweep, its weights in memory.

    Attributes:
        index: The layer's number.
        module: The layer, filled; its weights ask for no gradients.
        run: Runs the layer forward and backward over all batches, once.
    """

    index: int
    module: nn.Module
    run: Callable[[], None]


class BackwardSweep:
    """Gradients on their way back through a streamed model.

    A sequence's loss is its mean next-token cross entropy alone: labels are shifted once, and a
    router's auxiliary loss has no part in it. Losses of sequences are added up, so a sequence's
    gradients are those of its own loss whatever else is in its batch.

    Args:
        model: The streamed model.
        ids: Token ids [N, T].
        batch: Sequences per pass, as in the forward sweep; 1 where a layer holds its experts as a
            list (`models.has_expert_list`).
        boundaries: What that sweep kept.
        labels: "data": the tokens that follow. "model": drawn from the model's own next-token
            distributions, as the Fisher information is defined.
        targets: Labels [N, T], not shifted; `IGNORED` (padding) is not counted, with labels of the
            model neither. The token ids if not given.
        seed: Of the labels that are drawn.
        state: File that keeps gradients and losses after each layer, so that a killed sweep goes
            on; None to keep nothing. It knows its tokens, labels and dtype, and not its model.

    Raises:
        UserError: The model computes in float16, or a sequence has nothing to predict.
        ValueError: The batch is not 1 and must be.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids: torch.Tensor,
        batch: int,
        boundaries: BoundaryStore,
        *,
        labels: Literal["data", "model"] = "data",
        targets: torch.Tensor | None = None,
        seed: int = 0,
        state: Path | None = None,
    ) -> None:
        if model.dtype == torch.float16:
            raise UserError(
                "gradients underflow in float16; run the forward in bfloat16 or float32"
            )
        if batch > 1 and has_expert_list(model.model):
            raise ValueError("gradients of experts in a list take one sequence at a time")
        targets = ids if targets is None else targets
        empty = (targets[:, 1:] == IGNORED).all(dim=1).nonzero().flatten().tolist()
        if empty:
            raise UserError(f"calibration sequence {empty[0]} has no token to predict")
        self.model = model
        self.boundaries = boundaries
        self.labels = labels
        self.state = state
        self.batches = list(ids.split(batch))
        self.targets = list(targets.split(batch))
        generator = torch.Generator().manual_seed(seed)
        self.chances = list(torch.rand(targets.shape, generator=generator).split(batch))
        drawn = seed if labels == "model" else 0
        settings = json.dumps([str(model.dtype), batch, labels, drawn, list(ids.shape)])
        digest = hashlib.sha256(settings.encode())
        for tensor in (ids, targets):
            digest.update(tensor.to(torch.int64).cpu().contiguous().numpy().tobytes())
        self.digest = digest.hexdigest()

    def run(self, visit: Callable[[BackwardVisit], None], stop: int = 0) -> list[float]:
        """Visits the layers from the last to `stop`, or those that are left after a kill.

        Args:
            visit: Is called with each layer. Gradients are saved when it has returned: what it
                made of the layer must be safe by then.
            stop: The lowest layer to visit.

        Returns:
            Each sequence's loss.

        Raises:
            UserError: Losses or gradients are not finite, or the model's head records none.
        """
        model = self.model
        model.load_outer()
        model.model.requires_grad_(False)
        _, calls = embed_batches(model, self.batches)
        saved = self.saved_layer()
        if saved is None:
            saved = len(model.layers)
            self.boundaries.segment().clear()  # of other tokens, perhaps
            losses, gradients = self._head()
            self._save(saved, losses, gradients)
        else:
            losses, gradients = self._load()
        for index in reversed(range(stop, saved)):
            store = self._entering(index, calls)
            with model.layer(index) as module:
                module.requires_grad_(False)
                self._visit(visit, index, module, store, calls, gradients)
            self._save(index, losses, gradients)
            if index == stop or self.boundaries.has(index):
                self.boundaries.segment().clear()  # all of it is done
        return losses.tolist()

    def saved_layer(self) -> int | None:
        """The layer whose inputs the saved gradients belong to: it and those above it are done.

        The number of layers if only the head is done; None if nothing is saved that is of these
        tokens and can be read.
        """
        if self.state is None or not self.state.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.state), framework="pt", backend="pread") as file:
                metadata = file.metadata() or {}
                return int(metadata["layer"]) if metadata.get("of") == self.digest else None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def _head(self) -> tuple[torch.Tensor, list[Passed]]:
        """Losses [N] and, per batch, their gradients in what the last layer passes on."""
        model = self.model
        losses, gradients = [], []
        for b, ids in enumerate(self.batches):
            passed = _leaves(self.boundaries.batch(len(model.layers), b).to(model.device))
            logits = model.head(ids, passed, grad=True)
            if not logits.requires_grad:
                raise UserError(
                    f"{type(model.model).__name__}: its head runs without gradients; Fisher "
                    "information is not to be had"
                )
            with torch.enable_grad():
                loss = self._losses(b, logits)
            if not bool(torch.isfinite(loss).all()):
                raise UserError(
                    f"{type(model.model).__name__}: losses are not finite in {model.dtype}; try "
                    "another dtype"
                )
            losses.append(loss.detach().double().cpu())
            gradients.append(_gradients([loss.sum()], None, passed).cpu())
        return torch.cat(losses), gradients

    def _losses(self, b: int, logits: torch.Tensor) -> torch.Tensor:
        """Each sequence's mean cross entropy [B], of logits [B, T, V]."""
        losses = []
        for scores, targets, chances in zip(logits, self.targets[b], self.chances[b], strict=True):
            scores = scores[:-1].float()
            labels = targets[1:].to(scores.device)
            if self.labels == "model":
                drawn = _draw(scores.detach(), chances[1:].to(scores.device))
                labels = torch.where(labels == IGNORED, labels, drawn)
            losses.append(F.cross_entropy(scores, labels, ignore_index=IGNORED))
        return torch.stack(losses)

    def _visit(
        self,
        visit: Callable[[BackwardVisit], None],
        index: int,
        module: nn.Module,
        store: BoundaryStore,
        calls: list[list[LayerCall]],
        gradients: list[Passed],
    ) -> None:
        """Visits a filled layer; its outputs' gradients become its inputs', in place."""
        done = False

        def run() -> None:
            nonlocal done
            if done:
                raise ValueError(f"layer {index}: the gradients have gone through already")
            done = True
            with torch.enable_grad(), gradients_enabled(module):
                for b in range(len(gradients)):
                    gradients[b] = self._back(
                        index, module, store.batch(index, b), calls[b], gradients[b]
                    )

        visit(BackwardVisit(index, module, run))
        if not done:
            run()

    def _back(
        self,
        index: int,
        module: nn.Module,
        passed: Passed,
        calls: list[LayerCall],
        gradient: Passed,
    ) -> Passed:
        """The gradient in what enters a layer, of that in what leaves it; with grad enabled."""
        model = self.model
        passed = _leaves(passed.to(model.device))
        # Clones, because layers may change in place what they are given.
        output = model.run_layer(index, passed.map(torch.clone), calls[index])
        if not output.hidden.requires_grad:
            raise UserError(
                f"{type(module).__name__}: layer {index} runs without gradients; Fisher "
                "information is not to be had"
            )
        wanted = _differentiable(output)
        outer = [gradient.hidden, *(gradient.more[name] for name in wanted.more)]
        found = _gradients(
            [wanted.hidden, *wanted.more.values()], [g.to(model.device) for g in outer], passed
        ).cpu()
        if not all(bool(torch.isfinite(g).all()) for g in (found.hidden, *found.more.values())):
            raise UserError(
                f"{type(module).__name__}: gradients that leave layer {index} are not finite in "
                f"{model.dtype}; try another dtype"
            )
        return found

    def _entering(self, index: int, calls: list[list[LayerCall]]) -> BoundaryStore:
        """The store that has what enters a layer, computed from a kept boundary where it must."""
        model, kept, segment = self.model, self.boundaries, self.boundaries.segment()
        if kept.has(index):
            return kept
        # Layers of a segment come from last to first: the first call makes what the others use.
        start = next((i for i in reversed(range(index + 1)) if segment.has(i) or kept.has(i)), None)
        if start is None:
            raise ValueError(f"{kept.directory}: has no boundary below layer {index}")
        for layer in range(start, index):
            store = segment if segment.has(layer) else kept
            outputs = []
            with model.layer(layer), torch.no_grad():
                for b, passed in enumerate(calls):
                    entering = store.batch(layer, b).to(model.device)
                    outputs.append(model.run_layer(layer, entering, passed[layer]).cpu())
            segment.put(layer + 1, outputs)
        return segment

    def _save(self, layer: int, losses: torch.Tensor, gradients: list[Passed]) -> None:
        if self.state is None:
            return
        payload = batch_tensors(gradients)
        metadata = {"layer": str(layer), "of": self.digest}
        write_tensors(self.state, {**payload, "losses": losses}, metadata)

    def _load(self) -> tuple[torch.Tensor, list[Passed]]:
        from safetensors import safe_open

        with safe_open(str(self.state), framework="pt", backend="pread") as file:
            gradients = [read_batch(file, b) for b in range(len(self.batches))]
            return file.get_tensor("losses"), gradients


def _leaves(passed: Passed) -> Passed:
    """The same tensors, each the start of a graph where it is such as has gradients."""
    return passed.map(lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)


def _differentiable(passed: Passed) -> Passed:
    """Those of the tensors that have gradients."""
    more = {name: t for name, t in passed.more.items() if t.requires_grad}
    return Passed(passed.hidden, more)


def _gradients(
    outputs: list[torch.Tensor], outer: list[torch.Tensor] | None, passed: Passed
) -> Passed:
    """The gradients in what was passed, of those in outputs; zero where nothing depends on it.

    Args:
        outputs: What was computed.
        outer: The gradients in it; None if it is one number.
        passed: What it was computed from, made by `_leaves`.
    """
    leaves = _differentiable(passed)
    tensors = [leaves.hidden, *leaves.more.values()]
    found = torch.autograd.grad(outputs, tensors, outer, allow_unused=True)
    hidden, *more = (
        torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)
    )
    return Passed(hidden, dict(zip(leaves.more, more, strict=True)))


def _draw(scores: torch.Tensor, chances: torch.Tensor) -> torch.Tensor:
    """Draws a token per position by inversion: the same for every batch size and device.

    Args:
        scores: Logits [n, V].
        chances: Uniform random numbers [n] in [0, 1).

    Returns:
        Tokens [n].
    """
    reached = scores.softmax(-1).cumsum(-1)
    wanted = chances[:, None] * reached[:, -1:]
    drawn = torch.searchsorted(reached, wanted, right=True).squeeze(-1)
    return drawn.clamp(max=scores.shape[-1] - 1)
