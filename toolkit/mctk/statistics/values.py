"""Collected statistics: how they update, how large they are, how they are stored and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .needs import (
    ChannelEnergy,
    ExpertFrequency,
    Fisher,
    LayerSamples,
    Need,
    RouterWeight,
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


def to_tensors(value: Any) -> dict[str, torch.Tensor]:
    """A statistic's value as named tensors, for storage."""
    if isinstance(value, Moment):
        return {"value": value.value, "count": value.count}
    return {"value": value}


def from_tensors(need: Need, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `to_tensors`."""
    if isinstance(need, SecondMoment):
        return Moment(tensors["value"], tensors["count"])
    return tensors["value"]


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

    def __getitem__(self, need: Need) -> Any:
        key = self._key(need)
        if key not in self._values:
            raise KeyError(f"layer {self.layer}: {need} was not declared in the method's needs")
        value = self._values[key]
        return value() if callable(value) else value

    def __contains__(self, need: object) -> bool:
        # The inherited one would read the value to find out.
        return isinstance(need, Need) and self._key(need) in self._values

    def _key(self, need: Need) -> Need:
        """The need under which its value is kept: where no step came before, the original's."""
        key = need.canonical(self._banks)
        if key not in self._values and isinstance(key, SecondMoment | ChannelEnergy):
            return dataclasses.replace(key, of="original")
        return key

    def __iter__(self) -> Iterator[Need]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def size_of(need: Need, sites: Mapping[str, Any], hidden: int, itemsize: int, length: int) -> int:
    """Bytes that a statistic of one layer takes, for the plan.

    Of samples that is an upper bound: less where there are fewer calibration tokens.

    Args:
        need: The statistic.
        sites: The layer's `BankSite`s by name.
        hidden: Hidden size H.
        itemsize: Bytes of one element of the forward's dtype.
        length: Tokens of one calibration sequence.
    """
    if isinstance(need, SecondMoment):
        shape = sites[need.bank].shape
        n = shape.in_features if need.side == "input" else shape.out_features
        return (1 if need.pooled else shape.members) * (4 * n * n + 8)
    if isinstance(need, ChannelEnergy):
        shape = sites[need.bank].shape
        return 4 * (1 if need.weighted else shape.members) * shape.in_features
    if isinstance(need, Fisher):
        return 4 * sites[need.bank].shape.parameters
    if isinstance(need, LayerSamples):
        return -(-need.tokens // length) * length * hidden * itemsize
    if isinstance(need, ExpertFrequency | RouterWeight):
        return 8 * max((s.shape.members for s in sites.values() if s.part == "down"), default=0)
    raise TypeError(f"unknown need {need!r}")
