"""A tiny family swept forward and back, and the whole model's gradients beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import families
import torch
from mctk.checkpoint import Source
from mctk.models import bank_sites, find_layers, read_banks
from mctk.statistics import Fisher, GradientCollector
from mctk.sweep import (
    IGNORED,
    BackwardSweep,
    BackwardVisit,
    BoundaryStore,
    ForwardSweep,
    LayerVisit,
    StreamedModel,
)
from torch import nn

SEQUENCES, LENGTH = 4, 13

Values = dict[tuple[int, str], torch.Tensor]  # (layer, bank) → [members, out, in]


def plain(layer: LayerVisit) -> list[torch.Tensor]:
    return [layer.run(b).cpu() for b in range(len(layer.inputs))]


def padded(ids: torch.Tensor) -> torch.Tensor:
    """Labels of which some, at the end, at the start and in between, do not count."""
    labels = ids.clone()
    labels[0, 9:] = IGNORED
    labels[2, 1:5] = IGNORED
    labels[2, 7] = IGNORED
    return labels


def reference(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> tuple[Values, list]:
    """Mean squared gradients and the model's own losses: a whole backward for each sequence."""
    total = copy.deepcopy(model).requires_grad_(False)
    for parameter in total.parameters():
        parameter.zero_()
    losses = []
    for tokens, targets in zip(ids, labels, strict=True):
        model.zero_grad(set_to_none=True)
        loss = model(tokens[None], labels=targets[None], use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        for sums, parameter in zip(total.parameters(), model.parameters(), strict=True):
            if parameter.grad is not None:
                sums += parameter.grad.square() / len(ids)
    # The squares stand where weights do: split like them.
    return {
        (index, name): bank.terms[0].weight
        for index, layer in enumerate(find_layers(total)[1])
        for name, bank in read_banks(layer, index).items()
    }, losses


class Bench:
    """A family, streamed, and a sweep forward and back through it."""

    def __init__(self, root: Path, family: str, **changes: object) -> None:
        self.root = root
        self.whole = families.tiny(family, **changes)
        self.whole.save_pretrained(root / "model", max_shard_size="40KB")
        self.whole.set_experts_implementation("eager")
        self.model = StreamedModel(Source(root / "model"))
        self.sites = [bank_sites(layer) for layer in self.model.layers]
        self.ids = families.token_ids(SEQUENCES, LENGTH)

    def forward(self, batch: int, every: int = 1, first: int = 0) -> BoundaryStore:
        store = BoundaryStore(self.root / "boundaries", len(self.sites), every, first)
        store.clear()
        ForwardSweep(self.model, self.ids, batch, boundaries=store).run(plain)
        return store

    def collecting(
        self, values: Values, labels: str = "data", banks: list[str] | None = None
    ) -> Callable[[BackwardVisit], None]:
        def visit(layer: BackwardVisit) -> None:
            sites = self.sites[layer.index]
            needs = [Fisher(name, labels) for name in banks or sites]
            collector = GradientCollector(
                layer.module, layer.index, sites, needs, LENGTH, self.model.device
            )
            with collector.listening():
                layer.run()
            for need, value in collector.result().items():
                values[layer.index, need.bank] = value

        return visit

    def fisher(self, batch: int, every: int = 1, **settings: object) -> tuple[Values, list[float]]:
        values: Values = {}
        sweep = BackwardSweep(self.model, self.ids, batch, self.forward(batch, every), **settings)
        losses = sweep.run(self.collecting(values, settings.get("labels", "data")))
        return values, losses


def assert_close(values: Values, expected: Values) -> None:
    """Every member's matrix, in Frobenius norm."""
    assert values.keys() == expected.keys()
    for key, theirs in expected.items():
        ours = values[key]
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        for mine, right in zip(ours.double(), theirs.double(), strict=True):
            assert (mine - right).norm() <= 1e-5 * right.norm(), key
