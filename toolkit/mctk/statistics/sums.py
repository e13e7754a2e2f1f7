"""Sums over the rows that enter a bank: what most statistics are."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..terms import Bank
from .needs import SecondMoment
from .values import Magnitude, Moment


class Sum(Protocol):
    """Adds up something over rows that enter a bank."""

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes the rows x [n, in] of a member, their tokens [n] and routing weights [n]."""

    def value(self) -> Any:
        """The statistic, on the CPU."""


class MomentSum:
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
        """See `Sum`."""
        if self.bank is not None:
            x = self.bank.apply(x.to(self.bank.terms[0].dtype), member)
        x = x.float()
        place = 0 if self.pooled else member
        self.total[place].addmm_(x.T, x)
        self.count[place] += x.shape[0]

    def value(self) -> Moment:
        """See `Sum`."""
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


class EnergySum:
    """Accumulates Σ x_j² per member in float64; only rows are ever squared, so it costs nothing."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        shape = bank.shape
        self.total = torch.zeros(
            shape.members, shape.in_features, dtype=torch.float64, device=device
        )

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`."""
        self.total[member] += x.float().square().sum(0)

    def value(self) -> torch.Tensor:
        """See `Sum`."""
        return self.total.float().cpu()


class MagnitudeSum:
    """Accumulates Σ |x_j| per member in float64, as `EnergySum` does squares."""

    def __init__(self, bank: Bank, device: torch.device) -> None:
        shape = bank.shape
        self.total = torch.zeros(
            shape.members, shape.in_features, dtype=torch.float64, device=device
        )
        self.count = torch.zeros(shape.members, dtype=torch.int64)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`."""
        self.total[member] += x.abs().sum(0, dtype=torch.float64)
        self.count[member] += x.shape[0]

    def value(self) -> Magnitude:
        """See `Sum`."""
        return Magnitude(self.total.float().cpu(), self.count)


class ForwardSum:
    """A sum that is told when the experts of one forward begin and end.

    Experts come one after the other; this is for what depends on all of a token's experts, or on
    tokens that an expert did not get.
    """

    def begin(self, hidden: torch.Tensor, entered: torch.Tensor) -> None:
        """A forward begins.

        Args:
            hidden: Its tokens as they enter the experts, [T, H].
            entered: The same as they entered the Mixture-of-Experts block, [T, H].
        """

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`."""

    def end(self) -> None:
        """All experts have run."""


class WeightedEnergySum(ForwardSum):
    """Accumulates Σ_t (Σ_e g_e x_ej)²: a token's experts are gathered before anything is squared.

    The sums of one forward's tokens are kept, [T, in], and squared once all its experts have run.
    """

    def __init__(self, bank: Bank, device: torch.device) -> None:
        self.device = device
        self.total = torch.zeros(1, bank.shape.in_features, dtype=torch.float64, device=device)
        self.gathered = self.total.new_zeros(0)

    def begin(self, hidden: torch.Tensor, entered: torch.Tensor) -> None:
        """See `ForwardSum`."""
        self.gathered = torch.zeros(
            hidden.shape[0], self.total.shape[1], dtype=torch.float32, device=self.device
        )

    def end(self) -> None:
        """See `ForwardSum`."""
        self.total += self.gathered.square().sum(0)
        self.gathered = self.total.new_zeros(0)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`."""
        self.gathered.index_add_(0, token, x.float() * weights.float()[:, None])

    def value(self) -> torch.Tensor:
        """See `Sum`."""
        return self.total.float().cpu()
