"""What a method may ask to be measured: declared by plugins, collected by the engine.

A need is a value: two methods that ask for the same thing ask for it once. Each kind carries a
version, raised when its numbers change; version and settings are part of its identity in the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Need:
    """Base of all needs.

    Attributes:
        gradient: Whether it takes the backward sweep.
        transient: Whether it is too large to keep: it lives while its layer is worked on.
    """

    version: ClassVar[int] = 1
    gradient: ClassVar[bool] = False
    transient: ClassVar[bool] = False

    @property
    def current(self) -> bool:
        """Whether it is of what earlier steps leave, and not of the original."""
        return getattr(self, "of", "original") == "current"

    @property
    def compressed(self) -> bool:
        """Whether it is of the activations that the run's own compressed layers pass on."""
        return getattr(self, "of", "original") == "compressed"

    def identity(self) -> dict[str, Any]:
        """Kind, version and settings, as JSON."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": type(self).__name__, "version": self.version, **settings}

    def canonical(self, banks: Container[str]) -> Need:
        """The same need under the name that all banks of the layer share which it is the same for.

        Args:
            banks: The names of the layer's banks.
        """
        return self


@dataclass(frozen=True)
class ExpertFrequency(Need):
    """How many (token, slot) pairs the router sent to each expert: int64 [E]."""


@dataclass(frozen=True)
class RouterWeight(Need):
    """Sum of the routing weights that each expert got: float64 [E]."""


@dataclass(frozen=True)
class SecondMoment(Need):
    """Second moment of what enters or leaves a bank: `Moment` of float32 [members, n, n].

    Attributes:
        bank: The bank's name. What enters "experts.up" enters "experts.gate" too: such needs are
            collected once, under the name that `canonical` gives.
        side: "input": Σ x xᵀ, n = in_features; "output": Σ (W x)(W x)ᵀ without bias,
            n = out_features. Sums over the tokens that reached the member.
        of: "original": W are the original weights, x what enters them. "current": the matrices
            that the step is given, after the steps before it: W is the `Dense` term with the most
            slots (after a merge the residuals), x comes in the present order of the neurons. The
            same as "original" where no step came before. "compressed": as "current", but what
            enters the layer comes from the layers before it as this run has compressed them; a
            method may ask for it beside one of the others.
        pooled: One sum over all members, [1, n, n].
    """

    bank: str
    side: Literal["input", "output"] = "input"
    of: Literal["original", "current", "compressed"] = "original"
    pooled: bool = False

    def canonical(self, banks: Container[str]) -> SecondMoment:
        """See `Need.canonical`: inputs of up are those of gate."""
        if self.side == "input":
            return dataclasses.replace(self, bank=_same_input(self.bank, banks))
        return self


@dataclass(frozen=True)
class ChannelEnergy(Need):
    """Energy of each channel that enters a bank, a sum over tokens: float32 [members, in].

    Attributes:
        bank: The bank's name.
        weighted: Of the token's routing-weighted sum over its experts, Σ_t (Σ_e g_e x_ej)², one
            row [1, in]: what a base sees that all experts share. Otherwise Σ_t x_ej² over the
            tokens that reached member e, without routing weights.
        of: "current": the channels in the present order, after the steps before the one that
            asks; see `SecondMoment`. It matters to `weighted`, which adds up experts by channel.
    """

    bank: str = "experts.down"
    weighted: bool = False
    of: Literal["original", "current"] = "original"

    def canonical(self, banks: Container[str]) -> ChannelEnergy:
        """See `Need.canonical`: inputs of up are those of gate."""
        return dataclasses.replace(self, bank=_same_input(self.bank, banks))


@dataclass(frozen=True)
class Fisher(Need):
    """Squared gradients of a bank's weights, float32 [members, out, in]: the Fisher's diagonal.

    The mean over calibration sequences of (∂L/∂W)², L the mean next-token cross entropy of the
    sequence, without a router's auxiliary loss (empirical Fisher; D²-MoE, arXiv 2502.17298, eq. 4).

    Attributes:
        bank: The bank's name.
        labels: "data": the calibration tokens themselves. "model": drawn from the model's own
            next-token distribution.
    """

    gradient: ClassVar[bool] = True
    transient: ClassVar[bool] = True

    bank: str
    labels: Literal["data", "model"] = "data"


@dataclass(frozen=True)
class LayerSamples(Need):
    """Hidden states that enter the layer: the first sequences, in the forward's dtype [n, T, H].

    Attributes:
        tokens: How many at least (whole sequences are kept).
    """

    tokens: int = 4096


@dataclass(frozen=True)
class LayerPassed(Need):
    """What enters the layer beside `LayerSamples`, of the same sequences: name → tensor [n, ...].

    The engine's own: most families pass hidden states alone (`sweep.passed` has the names).

    Attributes:
        tokens: As in `LayerSamples`.
    """

    tokens: int = 4096


@dataclass(frozen=True)
class ChannelMagnitude(Need):
    """Magnitude of each channel that enters a bank, summed over tokens: `Magnitude`.

    Attributes:
        bank: The bank's name.
    """

    bank: str

    def canonical(self, banks: Container[str]) -> ChannelMagnitude:
        """See `Need.canonical`: inputs of up are those of gate."""
        return dataclasses.replace(self, bank=_same_input(self.bank, banks))


@dataclass(frozen=True)
class ChannelFisher(Need):
    """Squared gradients summed over each channel's weights: float32 [members, in] or [.., out].

    `Fisher` summed over its rows or columns; small enough to keep.

    Attributes:
        bank: The bank's name.
        side: "input" sums over all weights that read an input, "output" over all that give one.
        labels: As in `Fisher`.
    """

    gradient: ClassVar[bool] = True

    bank: str
    side: Literal["input", "output"]
    labels: Literal["data", "model"] = "data"


@dataclass(frozen=True)
class ExpertOutputs(Need):
    """Sums over what each expert gave for the tokens routed to it: `OutputSums`.

    Outputs as the model adds them up, biases and norms included, before routing weights.
    """


@dataclass(frozen=True)
class ExpertMeans(Need):
    """Mean output of each expert over *all* tokens, routed to it or not: float32 [E, H].

    Before routing weights. It runs every expert on every token, E/k times the work of a forward.
    """


@dataclass(frozen=True)
class RouterLogits(Need):
    """Second moment of the router's logits over all tokens: `Moment` of float32 [1, E, E].

    Logits are the products with the router's matrix, and its bias if it has one: before any
    softmax or sigmoid, and without the correction biases that only move the choice.
    """


@dataclass(frozen=True)
class RoutedOutputs(Need):
    """All experts' outputs on the same tokens, and how the router would choose: `RoutedSample`.

    It stores E² + E numbers a token, and runs every expert on every token of the sample.

    Attributes:
        tokens: How many tokens at most: the first of the calibration.
    """

    tokens: int = 16384


def _same_input(bank: str, banks: Container[str]) -> str:
    """The bank under whose name inputs of `bank` are collected."""
    return "experts.gate" if bank == "experts.up" and "experts.gate" in banks else bank
