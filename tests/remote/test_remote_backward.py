"""The sweep back through layers of remote code, whose experts are a list and run under no_grad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mctk.checkpoint import open_source
from mctk.models import bank_sites
from mctk.runtime import restore_buffers
from mctk.statistics import Fisher, GradientCollector
from mctk.sweep import (
    BackwardSweep,
    BackwardVisit,
    BoundaryStore,
    ForwardSweep,
    LayerVisit,
    StreamedModel,
)
from transformers import AutoModelForCausalLM

from tests.families import save_remote, token_ids

LENGTH = 11


@pytest.fixture(scope="module")
def without_auxiliary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In training mode its gradients are those of the next-token loss, to all digits."""
    return save_remote(tmp_path_factory.mktemp("remote") / "look-alike", aux_loss_alpha=1e-20)


def reference(path: Path, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Mean squared gradients by parameter and each sequence's loss, of the code's own training."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).train()
    restore_buffers(model)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for row in ids:
        model.zero_grad()
        loss = model(row[None], labels=row[None], use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square() / len(ids)
    return squares, losses


def test_squared_gradients_are_those_of_the_whole_model(without_auxiliary, tmp_path):
    ids = token_ids(3, LENGTH)
    expected, own = reference(without_auxiliary, ids)
    model = StreamedModel(open_source(str(without_auxiliary)), trust_remote_code=True)
    sites = [bank_sites(layer) for layer in model.layers]
    store = BoundaryStore(tmp_path / "boundaries", len(sites), every=2)

    def forward(layer: LayerVisit) -> list[torch.Tensor]:
        return [layer.run(b) for b in range(len(layer.inputs))]

    ForwardSweep(model, ids, 1, boundaries=store).run(forward)
    found: dict[str, torch.Tensor] = {}

    def visit(layer: BackwardVisit) -> None:
        here = sites[layer.index]
        needs = [Fisher(name) for name in here]
        collector = GradientCollector(
            layer.module, layer.index, here, needs, LENGTH, torch.device("cpu")
        )
        with collector.listening():
            layer.run()
        for need, value in collector.result().items():
            site = here[need.bank]
            path = f"model.layers.{layer.index}.{site.module}"
            if site.part == "linear":
                found[f"{path}.weight"] = value[0]
            else:
                for expert, square in enumerate(value):
                    found[f"{path}.{expert}.{site.part}_proj.weight"] = square

    losses = BackwardSweep(model, ids, 1, store).run(visit)
    assert losses == pytest.approx(own, rel=1e-5)
    assert sum(".experts." in name for name in found) == 2 * 8 * 3
    for name, square in found.items():
        assert (square - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_sequences_go_one_by_one(without_auxiliary, tmp_path):
    model = StreamedModel(open_source(str(without_auxiliary)), trust_remote_code=True)
    with pytest.raises(ValueError, match="one sequence at a time"):
        BackwardSweep(model, token_ids(2), 2, BoundaryStore(tmp_path, 3))
