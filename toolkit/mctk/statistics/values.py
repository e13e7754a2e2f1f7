"""Collected statistics: what they hold, how they are stored and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.rerouter import Rerouter
from .needs import (
    ChannelEnergy,
    ChannelMagnitude,
    ExpertOutputs,
    LayerPassed,
    Need,
    RoutedOutputs,
    RouterLogits,
    SecondMoment,
)


@dataclass(frozen=True)
class Moment:
    """A second moment, summed over tokens.

    Attributes:
        value: float32 [members, n, n], Σ x xᵀ over the tokens that reached each member; of a
            pooled one the sum over members, [1, n, n].
        count: int64 [members] or [1], how many those were.
    """

    value: torch.Tensor
    count: torch.Tensor

    def pooled(self) -> torch.Tensor:
        """The mean second moment [n, n] over all members' tokens; zero if there were none."""
        return self.value.sum(0) / self.count.sum().clamp(min=1)


@dataclass(frozen=True)
class Magnitude:
    """Magnitudes of channels, summed over tokens.

    Attributes:
        value: float32 [members, in], Σ |x_j| over the tokens that reached each member.
        count: int64 [members], how many those were.
    """

    value: torch.Tensor
    count: torch.Tensor

    def mean(self) -> torch.Tensor:
        """Mean |x_j| of each member, float32 [members, in]; zero where no token came."""
        return self.value / self.count.clamp(min=1)[:, None]


@dataclass(frozen=True)
class OutputSums:
    """Sums over the tokens routed to each expert, of its outputs y before routing weights.

    Attributes:
        count: Tokens, int64 [E].
        norm: Σ ‖y‖, float64 [E].
        weighted_norm: Σ g ‖y‖, g the routing weight as the model's sum uses it, float64 [E].
        largest: max ‖y‖, float64 [E].
        total: Σ y, float64 [E, H].
        square: Σ y_h², float64 [E, H].
    """

    count: torch.Tensor
    norm: torch.Tensor
    weighted_norm: torch.Tensor
    largest: torch.Tensor
    total: torch.Tensor
    square: torch.Tensor


Route = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RoutedSample:
    """All experts' outputs on some tokens, as far as choosing among the experts needs them.

    Attributes:
        inputs: What entered the Mixture-of-Experts block, in the forward's dtype [T, H].
        gram: Inner products of the experts' outputs y_e (before routing weights) of one token,
            float32 [T, E, E].
        target: y_e · z, z the routed experts' sum that the layer should give, float32 [T, E].
        energy: ‖z‖², float32 [T].
        route: Which of the kept experts (ascending) the model's own router chooses for each token
            if the others are not there, and with which weights: kept → (positions *among all E
            experts*, int64 [T, k]; weights, float32 [T, k]).
    """

    inputs: torch.Tensor
    gram: torch.Tensor
    target: torch.Tensor
    energy: torch.Tensor
    route: Route


def unbound(kept: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The `route` of a `RoutedSample` that no layer stands beside.

    Raises:
        ValueError: Always.
    """
    raise ValueError("re-routing takes the live layer: read the sample from `statistics.bind`")


_VALUES: dict[type[Need], type] = {
    SecondMoment: Moment,
    RouterLogits: Moment,
    ChannelMagnitude: Magnitude,
    ExpertOutputs: OutputSums,
    RoutedOutputs: RoutedSample,
}
"""What needs give that is no single tensor."""


def to_tensors(value: Any) -> dict[str, torch.Tensor]:
    """A statistic's value as named tensors, for storage."""
    if isinstance(value, torch.Tensor):
        return {"value": value}
    if isinstance(value, Mapping):
        return dict(value)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    fields.pop("route", None)  # of the live layer
    return fields


def from_tensors(need: Need, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `to_tensors`; a `RoutedSample` comes without a `route` (`unbound`)."""
    if isinstance(need, LayerPassed):
        return dict(tensors)
    kind = _VALUES.get(type(need))
    if kind is None:
        return tensors["value"]
    return kind(**tensors, **({"route": unbound} if kind is RoutedSample else {}))


def _routing(layer: nn.Module, inputs: torch.Tensor) -> Route:
    """How a live layer would route what entered its block, [T, H], among some of its experts."""
    router: Rerouter | None = None

    def route(kept: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal router, inputs
        if router is None:
            router = Rerouter(layer)
            inputs = inputs.to(next(layer.parameters()).device)  # once, not for every set
        index, weights = router(inputs, kept)
        return index.cpu(), weights.cpu()

    return route


class LayerStatistics(Mapping[Need, Any]):
    """One layer's statistics: a read-only mapping from each need to its value.

    Args:
        layer: The layer's number.
        values: Canonical need → value, or a function that reads it when asked for.
        banks: Names of the layer's banks.
    """

    def __init__(self, layer: int, values: Mapping[Need, Any], banks: Container[str]) -> None:
        self.layer = layer
        self._values = dict(values)
        self._banks = banks
        self._live: nn.Module | None = None

    def bind(self, layer: nn.Module) -> LayerStatistics:
        """The same statistics beside the live layer, whose router a `RoutedSample` then asks.

        Args:
            layer: The decoder layer, of original modules, its weights loaded.
        """
        bound = LayerStatistics(self.layer, self._values, self._banks)
        bound._live = layer
        return bound

    def __getitem__(self, need: Need) -> Any:
        key = self._key(need)
        if key not in self._values:
            raise KeyError(f"layer {self.layer}: {need} was not declared in the method's needs")
        value = self._values[key]
        value = value() if callable(value) else value
        if isinstance(value, RoutedSample) and self._live is not None:
            return dataclasses.replace(value, route=_routing(self._live, value.inputs))
        return value

    def __contains__(self, need: object) -> bool:
        # The inherited one would read the value to find out.
        return isinstance(need, Need) and self._key(need) in self._values

    def _key(self, need: Need) -> Need:
        """The need under which its value is kept: where no step came before, the original's.

        Of the compressed model's activations, as long as there are none, the original's.
        """
        key = need.canonical(self._banks)
        if isinstance(key, SecondMoment) and key.compressed and key not in self._values:
            key = dataclasses.replace(key, of="current")
        if key not in self._values and isinstance(key, SecondMoment | ChannelEnergy):
            return dataclasses.replace(key, of="original")
        return key

    def __iter__(self) -> Iterator[Need]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
