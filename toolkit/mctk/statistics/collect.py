"""Collects declared statistics of one layer while calibration batches pass through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runtime import observe
from ..terms import Bank, Bias
from .needs import ExpertFrequency, LayerSamples, Need, RouterWeight, SecondMoment
from .values import LayerStatistics, Moment

if TYPE_CHECKING:
    from ..models import BankSite


class _MomentSum:
    """Accumulates Σ x xᵀ per member in float32 (bfloat16 sums would be 5 % off)."""

    def __init__(self, need: SecondMoment, bank: Bank, device: torch.device) -> None:
        shape = bank.shape
        # Outputs are those of the weights alone: a constant has no place in their moment.
        linear = [term for term in bank.terms if term.kind != Bias.kind]
        self.bank = Bank(bank.name, bank.layer, shape, linear) if need.side == "output" else None
        n = shape.in_features if need.side == "input" else shape.out_features
        self.value = torch.zeros(shape.members, n, n, dtype=torch.float32, device=device)
        self.count = torch.zeros(shape.members, dtype=torch.int64)

    def __call__(self, member: int, x: torch.Tensor) -> None:
        if self.bank is not None:
            x = self.bank.apply(x.to(self.bank.terms[0].dtype), member)
        x = x.float()
        self.value[member].addmm_(x.T, x)
        self.count[member] += x.shape[0]


class LayerCollector:
    """Listens to one filled layer of original modules.

    Args:
        layer: The decoder layer.
        index: Its number.
        sites: Its bank sites by name.
        banks: Its banks (`read_banks`), for moments of outputs.
        needs: Canonical needs to collect.
        device: Where sums are kept.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        sites: dict[str, BankSite],
        banks: dict[str, Bank],
        needs: Iterable[Need],
        device: torch.device,
    ) -> None:
        self.layer, self.index, self.sites = layer, index, sites
        self.needs = list(needs)
        self.sums = {
            n: _MomentSum(n, banks[n.bank], device)
            for n in self.needs
            if isinstance(n, SecondMoment)
        }
        experts = next((s.shape.members for s in sites.values() if s.part == "down"), 0)
        self.frequency = torch.zeros(experts, dtype=torch.int64)
        self.router_weight = torch.zeros(experts, dtype=torch.float64)
        self.samples: dict[LayerSamples, list[torch.Tensor]] = {
            need: [] for need in self.needs if isinstance(need, LayerSamples)
        }

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, everything that passes through the layer is counted."""
        modules = dict(self.layer.named_modules())
        taps: dict[str, list[tuple[str, _MomentSum]]] = {}
        for need, total in self.sums.items():
            site = self.sites[need.bank]
            taps.setdefault(site.module, []).append((site.part, total))
        with contextlib.ExitStack() as stack:
            for path in {site.module for site in self.sites.values() if site.part == "down"}:
                stack.enter_context(observe(modules[path], self._expert_tap(taps.get(path, []))))
            for path, listeners in taps.items():
                if self._is_linear(path):
                    handle = modules[path].register_forward_pre_hook(_linear_tap(listeners))
                    stack.callback(handle.remove)
            yield

    def _is_linear(self, path: str) -> bool:
        return any(s.module == path and s.part == "linear" for s in self.sites.values())

    def _expert_tap(self, listeners: list[tuple[str, _MomentSum]]) -> Callable[..., None]:
        def tap(
            expert: int,
            token: torch.Tensor,
            slot: torch.Tensor,
            x: torch.Tensor,
            h: torch.Tensor,
            y: torch.Tensor,
            weights: torch.Tensor,
        ) -> None:
            self.frequency[expert] += x.shape[0]
            self.router_weight[expert] += float(weights.double().sum())
            for part, total in listeners:
                total(expert, h if part == "down" else x)

        return tap

    def sample(self, inputs: list[torch.Tensor]) -> None:
        """Keeps the first sequences that enter the layer ([B, T, H] a batch), if asked for."""
        for need, samples in self.samples.items():
            kept = 0
            for batch in inputs:
                if kept >= need.tokens:
                    break
                rows = -(-(need.tokens - kept) // batch.shape[1])
                samples.append(batch[:rows].cpu().clone())
                kept += samples[-1].shape[0] * batch.shape[1]

    def result(self) -> LayerStatistics:
        """The layer's statistics, on the CPU."""
        values: dict[Need, Any] = {}
        for need in self.needs:
            if isinstance(need, SecondMoment):
                total = self.sums[need]
                values[need] = Moment(total.value.cpu(), total.count)
            elif isinstance(need, ExpertFrequency):
                values[need] = self.frequency
            elif isinstance(need, RouterWeight):
                values[need] = self.router_weight
            elif isinstance(need, LayerSamples):
                values[need] = torch.cat(self.samples[need])
            else:
                raise TypeError(f"no collector for {need!r}")
        return LayerStatistics(self.index, values, self.sites)


def _linear_tap(listeners: list[tuple[str, _MomentSum]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        for _, total in listeners:
            total(0, rows)

    return hook
