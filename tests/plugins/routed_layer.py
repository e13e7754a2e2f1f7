"""A tiny family's MoE layer with the statistics that experts are chosen by, and samples by hand."""

from __future__ import annotations

import torch
from d2moe_layer import after
from mctk.models import bank_sites, installed, read_banks
from mctk.statistics import LayerCollector, LayerStatistics, RoutedOutputs, RoutedSample

from tests.families import tiny


class RoutedLayer:
    """The last decoder layer of a tiny family, its block's inputs and what was measured on them."""

    def __init__(self, family: str, tokens: int = 60, **config: object) -> None:
        self.model = tiny(family, **config)
        self.model.set_experts_implementation("mctk")
        self.number = len(self.model.model.layers) - 1
        self.layer = self.model.model.layers[self.number]
        self.sites = bank_sites(self.layer)
        self.banks = read_banks(self.layer, self.number)
        self.experts = {n: b for n, b in self.banks.items() if n.startswith("experts.")}
        self.path = self.sites["experts.down"].module.rpartition(".")[0]
        self.block = self.layer.get_submodule(self.path)
        generator = torch.Generator().manual_seed(3)
        hidden = self.experts["experts.down"].shape.out_features
        self.x = torch.randn(1, tokens, hidden, generator=generator)
        need = RoutedOutputs(tokens)
        collector = LayerCollector(
            self.layer, self.number, self.sites, self.banks, [need], torch.device("cpu")
        )
        with torch.no_grad(), collector.listening():
            self.run()
        self.statistics: LayerStatistics = collector.result().bind(self.layer)
        self.sample: RoutedSample = self.statistics[need]

    def run(self) -> torch.Tensor:
        """The block's output, [T, H]."""
        with torch.no_grad():
            found = self.layer.get_submodule(self.path)(self.x)
        return (found[0] if isinstance(found, tuple) else found)[0]

    def run_with(self, terms: dict) -> torch.Tensor:
        """The block's output with other experts, and the router without removed ones, [T, H]."""
        with installed(self.layer, after(self.experts, terms), torch.float32):
            return self.run()


def hand_made(logits: torch.Tensor, outputs: torch.Tensor, top: int = 2) -> RoutedSample:
    """A sample of experts' outputs [T, E, H], routed as Mixtral does by logits [T, E]."""

    def route(kept):
        masked = torch.full_like(logits, float("-inf"))
        masked[:, list(kept)] = logits[:, list(kept)]
        weights, index = masked.softmax(1).topk(top, dim=1)
        return index, weights / weights.sum(1, keepdim=True)

    index, weights = route(range(logits.shape[1]))
    z = (
        outputs.gather(1, index[:, :, None].expand(-1, -1, outputs.shape[2])) * weights[:, :, None]
    ).sum(1)
    return RoutedSample(
        inputs=torch.zeros(logits.shape[0], 1),
        gram=outputs @ outputs.transpose(1, 2),
        target=(outputs @ z[:, :, None])[:, :, 0],
        energy=z.square().sum(1),
        route=route,
    )
