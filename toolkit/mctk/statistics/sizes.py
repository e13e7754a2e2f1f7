"""How large statistics are, before they are collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .needs import (
    ChannelEnergy,
    ChannelFisher,
    ChannelMagnitude,
    ExpertFrequency,
    ExpertMeans,
    ExpertOutputs,
    Fisher,
    LayerPassed,
    LayerSamples,
    Need,
    RoutedOutputs,
    RouterLogits,
    RouterWeight,
    SecondMoment,
)

if TYPE_CHECKING:
    from ..models import BankSite


def size_of(
    need: Need, sites: Mapping[str, BankSite], hidden: int, itemsize: int, length: int
) -> int:
    """Bytes that a statistic of one layer takes, for the plan.

    Of samples that is an upper bound: less where there are fewer calibration tokens. What passes
    beside hidden states is known by running the model only: taken for as large as they are.

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
    if isinstance(need, ChannelMagnitude):
        return sites[need.bank].shape.members * (4 * sites[need.bank].shape.in_features + 8)
    if isinstance(need, Fisher):
        return 4 * sites[need.bank].shape.parameters
    if isinstance(need, ChannelFisher):
        shape = sites[need.bank].shape
        channels = shape.in_features if need.side == "input" else shape.out_features
        return 4 * shape.members * channels
    if isinstance(need, LayerSamples | LayerPassed):
        return -(-need.tokens // length) * length * hidden * itemsize
    experts = max((s.shape.members for s in sites.values() if s.part == "down"), default=0)
    if isinstance(need, ExpertFrequency | RouterWeight):
        return 8 * experts
    if isinstance(need, ExpertOutputs):
        return experts * (4 * 8 + 2 * 8 * hidden)
    if isinstance(need, ExpertMeans):
        return 4 * experts * hidden
    if isinstance(need, RouterLogits):
        return 4 * experts * experts + 8
    if isinstance(need, RoutedOutputs):
        return need.tokens * (hidden * itemsize + 4 * (experts * experts + experts + 1))
    raise TypeError(f"unknown need {need!r}")
