"""Collects declared statistics of one layer while calibration batches pass through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..runtime import observe, observed_forward
from ..terms import Bank
from .needs import (
    ChannelEnergy,
    ExpertFrequency,
    LayerSamples,
    Need,
    RouterWeight,
    SecondMoment,
)
from .values import LayerStatistics, Moment

if TYPE_CHECKING:
    from ..models import BankSite


class _Sum(Protocol):
    """Adds up something over rows that enter a bank."""

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes the rows x [n, in] of a member, their tokens [n] and routing weights [n]."""

    def value(self) -> Any:
        """The statistic, on the CPU."""


class _MomentSum:
    """Accumulates Σ x xᵀ per member in float32 (bfloat16 sums would be 5 % off)."""

    def __init__(self, need: SecondMoment, bank: Bank, device: torch.device) -> None:
        shape = bank.shape
        self.bank = _matrices(bank, need.of, device) if need.side == "output" else None
        self.pooled = need.pooled
        n = shape.in_features if need.side == "input" else shape.out_features
        sums = 1 if need.pooled else shape.members
        self.total = torch.zeros(sums, n, n, dtype=torch.float32, device=device)
        self.count = torch.zeros(sums, dtype=torch.int64)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `_Sum`."""
        if self.bank is not None:
            x = self.bank.apply(x.to(self.bank.terms[0].dtype), member)
        x = x.float()
        place = 0 if self.pooled else member
        self.total[place].addmm_(x.T, x)
        self.count[place] += x.shape[0]

    def value(self) -> Moment:
        """See `_Sum`."""
        return Moment(self.total.cpu(), self.count)


def _matrices(bank: Bank, of: str, device: torch.device) -> Bank:
    """A bank of the terms whose outputs are asked for.

    Outputs are those of weights alone: a constant has no place in their moment. Of a model's own
    bank that is the sum of its terms; of a bank that steps have worked on it is the term with one
    matrix per member (or per group), without a base that the members share.
    """
    if of == "original":
        return bank.without_biases()
    own = bank.matrices()
    if own is None:
        raise ValueError(f"{bank.name} of layer {bank.layer}: has no dense term left")
    return Bank(bank.name, bank.layer, bank.shape, [own.to(device=device)])


class _EnergySum:
    """Accumulates Σ x_j² per member in float64; only rows are ever squared, so it costs nothing."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        shape = bank.shape
        self.total = torch.zeros(
            shape.members, shape.in_features, dtype=torch.float64, device=device
        )

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `_Sum`."""
        self.total[member] += x.float().square().sum(0)

    def value(self) -> torch.Tensor:
        """See `_Sum`."""
        return self.total.float().cpu()


class _WeightedEnergySum:
    """Accumulates Σ_t (Σ_e g_e x_ej)²: a token's experts are gathered before anything is squared.

    Experts come one after the other, so the sums of one forward's tokens are kept, [T, in], and
    squared once all its experts have run.
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros(1, bank.shape.in_features, dtype=torch.float64, device=device)
        self.gathered = self.total.new_zeros(0)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins: the hook before it."""
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden.numel() // hidden.shape[-1]
        self.gathered = torch.zeros(
            tokens, self.total.shape[1], dtype=torch.float32, device=self.device
        )

    def end(self, *_: Any) -> None:
        """It has ended: the hook after it."""
        self.total += self.gathered.square().sum(0)
        self.gathered = self.total.new_zeros(0)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `_Sum`."""
        self.gathered.index_add_(0, token, x.float() * weights.float()[:, None])

    def value(self) -> torch.Tensor:
        """See `_Sum`."""
        return self.total.float().cpu()


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
        self.sums: dict[Need, tuple[str, _Sum]] = {}  # with the name of the bank
        for need in self.needs:
            if isinstance(need, SecondMoment | ChannelEnergy):
                self.sums[need] = need.bank, self._sum(need, banks[need.bank], device)
        experts = next((s.shape.members for s in sites.values() if s.part == "down"), 0)
        self.frequency = torch.zeros(experts, dtype=torch.int64)
        self.router_weight = torch.zeros(experts, dtype=torch.float64)
        self.samples: dict[LayerSamples, list[torch.Tensor]] = {
            need: [] for need in self.needs if isinstance(need, LayerSamples)
        }

    def _sum(self, need: SecondMoment | ChannelEnergy, bank: Bank, device: torch.device) -> _Sum:
        if isinstance(need, SecondMoment):
            return _MomentSum(need, bank, device)
        if not need.weighted:
            return _EnergySum(bank, device)
        if self.sites[need.bank].part == "linear":
            raise ValueError(f"{need}: no routing weights belong to {need.bank}")
        return _WeightedEnergySum(bank, device)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, everything that passes through the layer is counted."""
        modules = dict(self.layer.named_modules())
        taps: dict[str, list[tuple[str, _Sum]]] = {}
        for bank, total in self.sums.values():
            site = self.sites[bank]
            taps.setdefault(site.module, []).append((site.part, total))
        with contextlib.ExitStack() as stack:
            for path in {site.module for site in self.sites.values() if site.part == "down"}:
                stack.enter_context(observe(modules[path], self._expert_tap(taps.get(path, []))))
            for path, listeners in taps.items():
                if self._is_linear(path):
                    handle = modules[path].register_forward_pre_hook(_linear_tap(listeners))
                    stack.callback(handle.remove)
                for _, total in listeners:
                    if isinstance(total, _WeightedEnergySum):
                        module = observed_forward(modules[path])
                        before = module.register_forward_pre_hook(total.begin, with_kwargs=True)
                        after = module.register_forward_hook(total.end)
                        stack.callback(before.remove)
                        stack.callback(after.remove)
            yield

    def _is_linear(self, path: str) -> bool:
        return any(s.module == path and s.part == "linear" for s in self.sites.values())

    def _expert_tap(self, listeners: list[tuple[str, _Sum]]) -> Callable[..., None]:
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
                total.add(expert, h if part == "down" else x, token, weights)

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
            if need in self.sums:
                values[need] = self.sums[need][1].value()
            elif isinstance(need, ExpertFrequency):
                values[need] = self.frequency
            elif isinstance(need, RouterWeight):
                values[need] = self.router_weight
            elif isinstance(need, LayerSamples):
                values[need] = torch.cat(self.samples[need])
            else:
                raise TypeError(f"no collector for {need!r}")
        return LayerStatistics(self.index, values, self.sites)


def _linear_tap(listeners: list[tuple[str, _Sum]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        token = torch.arange(rows.shape[0], device=rows.device)
        for _, total in listeners:
            total.add(0, rows, token, rows.new_ones(rows.shape[0]))

    return hook
