"""Collects declared statistics of one layer while calibration batches pass through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..terms import Bank
from .listen import listening_to_forwards
from .needs import (
    ChannelEnergy,
    ChannelMagnitude,
    ExpertFrequency,
    ExpertMeans,
    ExpertOutputs,
    LayerPassed,
    LayerSamples,
    Need,
    RoutedOutputs,
    RouterLogits,
    RouterWeight,
    SecondMoment,
)
from .outputs import EveryMean, OutputTotals
from .routed import RoutedGrams
from .router import LogitMoment
from .sums import EnergySum, MagnitudeSum, MomentSum, Sum, WeightedEnergySum
from .values import LayerStatistics

if TYPE_CHECKING:
    from ..models import BankSite

OUTPUT = "output"  # of a sum whose rows are what the experts give


class LayerCollector:
    """Listens to one filled layer.

    Args:
        layer: The decoder layer: of original modules, or, for needs of what steps left ("current"),
            as it runs with those terms.
        index: Its number.
        sites: Its bank sites by name.
        banks: Its banks, for moments of outputs: as read from the layer (`read_banks`), or, for
            needs of "current", as the steps left them.
        needs: Canonical needs to collect, none of gradients.
        device: Where sums are kept.
        reference: For `RoutedOutputs`, where what enters the layer is not the original's: what the
            original layer's routed experts gave for the same tokens (`RoutedSum`).

    Raises:
        UserError: A need cannot be met by this layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        sites: dict[str, BankSite],
        banks: dict[str, Bank],
        needs: Iterable[Need],
        device: torch.device,
        *,
        reference: torch.Tensor | None = None,
    ) -> None:
        self.layer, self.index, self.sites, self.device = layer, index, sites, device
        self.needs = list(needs)
        self.reference = reference
        experts = [site for site in sites.values() if site.part == "down"]
        self.experts = experts[0] if experts else None
        count = experts[0].shape.members if experts else 0
        self.frequency = torch.zeros(count, dtype=torch.int64)
        self.router_weight = torch.zeros(count, dtype=torch.float64)
        self.sums: dict[Need, Sum] = {}
        self.taps: dict[str, list[tuple[str, Sum]]] = {}  # by module: what rows, and who adds up
        self.logits: dict[RouterLogits, LogitMoment] = {}
        for need in self.needs:
            self._add(need, banks)
        self.samples: dict[LayerSamples, list[torch.Tensor]] = {
            need: [] for need in self.needs if isinstance(need, LayerSamples)
        }
        self.passed: dict[LayerPassed, list[Mapping[str, torch.Tensor]]] = {
            need: [] for need in self.needs if isinstance(need, LayerPassed)
        }

    def _add(self, need: Need, banks: dict[str, Bank]) -> None:
        """Sets up who listens for a need."""
        if isinstance(need, SecondMoment | ChannelEnergy | ChannelMagnitude):
            site = self.sites[need.bank]
            self.sums[need] = self._of_bank(need, banks[need.bank])
            self.taps.setdefault(site.module, []).append((site.part, self.sums[need]))
        elif isinstance(need, ExpertOutputs | ExpertMeans | RoutedOutputs | RouterLogits):
            if self.experts is None:
                raise ValueError(f"{need}: layer {self.index} has no experts")
            if isinstance(need, RouterLogits):
                self.logits[need] = LogitMoment(self.layer, self.sites, self.device)
                return
            self.sums[need] = self._of_outputs(need, self.experts)
            self.taps.setdefault(self.experts.module, []).append((OUTPUT, self.sums[need]))

    def _of_bank(self, need: SecondMoment | ChannelEnergy | ChannelMagnitude, bank: Bank) -> Sum:
        if isinstance(need, SecondMoment):
            return MomentSum(need, bank, self.device)
        if isinstance(need, ChannelMagnitude):
            return MagnitudeSum(bank, self.device)
        if not need.weighted:
            return EnergySum(bank, self.device)
        if self.sites[need.bank].part == "linear":
            raise ValueError(f"{need}: no routing weights belong to {need.bank}")
        return WeightedEnergySum(bank, self.device)

    def _of_outputs(self, need: ExpertOutputs | ExpertMeans | RoutedOutputs, down: BankSite) -> Sum:
        experts, hidden = down.shape.members, down.shape.out_features
        module = self.layer.get_submodule(down.module)
        if isinstance(need, ExpertOutputs):
            return OutputTotals(experts, hidden, self.device)
        if isinstance(need, ExpertMeans):
            return EveryMean(module, experts, hidden, self.device)
        return RoutedGrams(need, module, experts, self.device, self.reference)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, everything that passes through the layer is counted."""
        with contextlib.ExitStack() as stack:
            for path in {site.module for site in self.sites.values() if site.part == "down"}:
                listeners = self.taps.get(path, [])
                listening = listening_to_forwards(self.layer, path, listeners, self._count)
                stack.enter_context(listening)
            for path, listeners in self.taps.items():
                if any(s.module == path and s.part == "linear" for s in self.sites.values()):
                    module = self.layer.get_submodule(path)
                    handle = module.register_forward_pre_hook(_linear_tap(listeners))
                    stack.callback(handle.remove)
            for total in self.logits.values():
                handle = total.module.register_forward_pre_hook(total.before, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _count(self, expert: int, weights: torch.Tensor) -> None:
        self.frequency[expert] += weights.shape[0]
        self.router_weight[expert] += float(weights.double().sum())

    def sample(
        self,
        inputs: Iterable[torch.Tensor],
        more: Iterable[Mapping[str, torch.Tensor]] = (),
    ) -> None:
        """Keeps the first sequences that enter the layer, if asked for.

        Args:
            inputs: Hidden states [B, T, H], one entry a batch.
            more: What enters it beside them, by name, one entry a batch; none if nothing does.
        """
        asking: list[LayerSamples | LayerPassed] = [*self.samples, *self.passed]
        besides = iter(more)
        seen = 0  # tokens of the batches before
        for batch in inputs:
            if all(need.tokens <= seen for need in asking):
                break
            beside = next(besides, {})
            for need in asking:
                rows = -(-(need.tokens - seen) // batch.shape[1])
                if rows <= 0:
                    continue
                if isinstance(need, LayerSamples):
                    self.samples[need].append(batch[:rows].cpu().clone())
                else:
                    kept = {name: tensor[:rows].cpu().clone() for name, tensor in beside.items()}
                    self.passed[need].append(kept)
            seen += batch.shape[0] * batch.shape[1]

    def result(self) -> LayerStatistics:
        """The layer's statistics, on the CPU."""
        values: dict[Need, Any] = {}
        for need in self.needs:
            if need in self.sums:
                values[need] = self.sums[need].value()
            elif isinstance(need, RouterLogits):
                values[need] = self.logits[need].value()
            elif isinstance(need, ExpertFrequency):
                values[need] = self.frequency
            elif isinstance(need, RouterWeight):
                values[need] = self.router_weight
            elif isinstance(need, LayerSamples):
                values[need] = torch.cat(self.samples[need])
            elif isinstance(need, LayerPassed):
                batches = self.passed[need]
                values[need] = {
                    name: torch.cat([batch[name] for batch in batches])
                    for name in (batches[0] if batches else ())
                }
            else:
                raise TypeError(f"no collector for {need!r}")
        return LayerStatistics(self.index, values, self.sites)


def _linear_tap(listeners: list[tuple[str, Sum]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        token = torch.arange(rows.shape[0], device=rows.device)
        for _, total in listeners:
            total.add(0, rows, token, rows.new_ones(rows.shape[0]))

    return hook
