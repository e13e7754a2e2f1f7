"""Statistics of a compressed prefix: `propagate: compressed`, and needs `of="compressed"`.

A sequential run's calibration tokens go through its own layers as it stores them. When a layer is
about to be rewritten, what the layers before it pass on goes through the layer as it is in the
original, with collectors listening; the passes run; and the rewritten layer gives what the next one
sees. What enters the layer at work is on disk in the run's state, so that a killed run goes on.

A statistic may compare with the original's layer on the original's inputs (`RoutedOutputs`): then
the original's hidden states are kept beside, once for all runs of the set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models import read_banks
from ..statistics import LayerCollector, LayerStatistics, Need, RoutedOutputs, RoutedSum
from ..sweep import BoundaryStore, KeptBatches, LayerCall, Passed, StreamedModel, embed_batches
from .current import prepared_layer
from .prepare import Preparation

if TYPE_CHECKING:
    from ..models import BankSite

PREFIX = "prefix"  # directory of a run's hidden states
STREAM = "stream"  # of the original's, in one run's state


@dataclass
class Tokens:
    """All calibration tokens, for sequential runs.

    Attributes:
        ids: Sequences [N, T].
        batch: Sequences per forward pass.
    """

    ids: torch.Tensor
    batch: int
    _calls: list[list[LayerCall]] | None = None

    @property
    def count(self) -> int:
        """How many batches there are."""
        return -(-self.ids.shape[0] // self.batch)

    def embed(self, model: StreamedModel) -> list[Passed]:
        """What enters layer 0, one entry a batch; the model's embeddings must be loaded."""
        passed, self._calls = embed_batches(model, list(self.ids.split(self.batch)))
        return passed

    def calls(self, model: StreamedModel) -> list[list[LayerCall]]:
        """Per batch, per layer, what the layer is passed."""
        if self._calls is None:
            self.embed(model)
        assert self._calls is not None
        return self._calls


class CompressedPrefix:
    """One sequential run's hidden states, between the layers that it has written and the rest.

    Args:
        model: The original, streamed; embeddings loaded.
        preparation: The run's plan, statistics and prepared layers.
        tokens: The calibration's tokens.
        state: The run's state directory.
    """

    def __init__(
        self, model: StreamedModel, preparation: Preparation, tokens: Tokens, state: Path
    ) -> None:
        self.model, self.preparation, self.tokens = model, preparation, tokens
        self.plan = preparation.plan
        self.store = prefix_store(state, len(model.layers))
        self.last = max(self.plan.recollected)

    def begin(self, start: int) -> None:
        """Prepares for the layer `start`, which `finished_layers` has found to be ready."""
        if start == 0:
            self.store.clear()
            self.store.put(0, self.tokens.embed(self.model))
        elif start <= self.last:
            self._split(start)
            for layer in range(start):
                self.store.drop(layer)
        else:
            self.store.clear()

    def _split(self, layer: int) -> None:
        """Splits kept states anew if the run was begun with another batch size."""
        kept = self.store.get(layer)
        wanted = self.tokens.ids.split(self.tokens.batch)
        if [len(x) for x in kept] != [len(x) for x in wanted]:
            self.store.put(layer, Passed.cat(kept).split([len(x) for x in wanted]))

    def statistics(
        self, index: int, module: nn.Module, reference: torch.Tensor | None
    ) -> LayerStatistics:
        """All statistics of a filled layer of original modules, those of this prefix taken now.

        Args:
            index: The layer.
            module: It.
            reference: What its routed experts give in the original, float32 [n, H] of the first
                tokens, where a statistic compares with that.

        Returns:
            These, and of the original what is not taken anew.
        """
        wanted = self.plan.recollected.get(index, [])
        left = [need for need in wanted if need.current or need.compressed]
        plain = [need for need in wanted if need not in left]
        values: dict[Need, Any] = {}
        if left:
            with prepared_layer(self.model, module, index, self.preparation) as (banks, original):
                if original:  # one pass gives both
                    left, plain = [*left, *plain], []
                values |= self._listen(index, module, banks, left, reference)
        if plain:
            values |= self._listen(index, module, read_banks(module, index), plain, reference)
        return self.preparation.statistics(index, values)

    def _listen(
        self,
        index: int,
        module: nn.Module,
        banks: dict[str, Any],
        needs: list[Need],
        reference: torch.Tensor | None,
    ) -> dict[Need, Any]:
        collector = LayerCollector(
            module,
            index,
            self.plan.sites[index],
            banks,
            needs,
            self.model.device,
            reference=reference,
        )
        inputs = KeptBatches(self.store, index, self.tokens.count)
        collector.sample((x.hidden for x in inputs), (x.more for x in inputs))
        with collector.listening(), torch.no_grad():
            for passed, call in zip(inputs, self._calls(index), strict=True):
                self.model.run_layer(index, passed.to(self.model.device), call)
        return dict(collector.result())

    def leave(self, index: int) -> None:
        """Runs the layer, in which its stored terms are installed, for the next layer to see."""
        if index < self.last:
            _run_on(self.model, self.store, index, self._calls(index))

    def done(self, index: int) -> None:
        """The layer is written and recorded: what entered it is not needed any more."""
        self.store.drop(index)
        if index >= self.last:
            self.store.clear()

    def _calls(self, index: int) -> list[LayerCall]:
        return [calls[index] for calls in self.tokens.calls(self.model)]


def prefix_store(state: Path, layers: int) -> BoundaryStore:
    """Where a sequential run keeps what enters the layer at work."""
    return BoundaryStore(state / PREFIX, layers)


class OriginalStream:
    """The original's hidden states beside those of compressed prefixes, as far as compared.

    Args:
        model: The original, streamed; embeddings loaded.
        tokens: The calibration's tokens.
        state: Directory of a run's state.
        needs: By layer, the statistics that compare with the original; the stream goes no further
            than the last such layer, and takes the first sequences that hold their tokens.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tokens,
        state: Path,
        needs: dict[int, list[RoutedOutputs]],
    ) -> None:
        self.model, self.tokens, self.needs = model, tokens, needs
        self.store = BoundaryStore(state / STREAM, len(model.layers))
        self.last = max(needs)
        most = max(need.tokens for wanted in needs.values() for need in wanted)
        length = tokens.ids.shape[1]
        self.count = min(tokens.count, -(-most // (length * tokens.batch)))
        self.first = 0

    def begin(self, start: int) -> None:
        """Prepares for the layer `start`: runs the layers before it if their outputs are gone."""
        self.first = start
        if start > self.last:
            return
        wanted = self.tokens.ids.split(self.tokens.batch)[: self.count]
        if start and self.store.has(start):
            kept = self.store.get(start)
            if [len(x) for x in kept] == [len(x) for x in wanted]:
                return
        self.store.clear()
        self.store.put(0, self.tokens.embed(self.model)[: self.count])
        for layer in range(start):
            with self.model.layer(layer):
                _run_on(self.model, self.store, layer, self._calls(layer))
            self.store.drop(layer)

    def visit(
        self, index: int, module: nn.Module, sites: dict[str, BankSite]
    ) -> torch.Tensor | None:
        """Runs a filled original layer on the original's inputs.

        Returns:
            What its routed experts gave, float32 [n, H]; None where nobody compares with it.
        """
        if not self.first <= index <= self.last:
            return None
        wanted = self.needs.get(index)
        routed = None
        with contextlib.ExitStack() as stack:
            if wanted:
                most = max(need.tokens for need in wanted)
                routed = RoutedSum(module, sites, most, self.model.device)
                stack.enter_context(routed.listening())
            _run_on(self.model, self.store, index, self._calls(index))
        return None if routed is None else routed.value()

    def done(self, index: int) -> None:
        """All runs have done the layer."""
        if index >= self.first:
            self.store.drop(index)
        if index >= self.last:
            self.store.clear()

    def _calls(self, index: int) -> list[LayerCall]:
        return [calls[index] for calls in self.tokens.calls(self.model)[: self.count]]


def _run_on(
    model: StreamedModel, store: BoundaryStore, index: int, calls: Sequence[LayerCall]
) -> None:
    """Runs a layer on what enters it, for what enters the next."""
    outputs = []
    with torch.no_grad():
        for passed, call in zip(KeptBatches(store, index, len(calls)), calls, strict=True):
            outputs.append(model.run_layer(index, passed.to(model.device), call).cpu())
    store.put(index + 1, outputs)
