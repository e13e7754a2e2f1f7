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
    """Base of all needs."""

    version: ClassVar[int] = 1

    def identity(self) -> dict[str, Any]:
        """Kind, version and settings, as JSON."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": type(self).__name__, "version": self.version, **settings}


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
        side: "input": Σ x xᵀ, n = in_features; "output": Σ (W x)(W x)ᵀ with the original weights
            and without bias, n = out_features. Sums over the tokens that reached the member.
    """

    bank: str
    side: Literal["input", "output"] = "input"

    def canonical(self, banks: Container[str]) -> SecondMoment:
        """The same need under the name that the banks of a layer with this input share."""
        if self.side == "input" and self.bank == "experts.up" and "experts.gate" in banks:
            return SecondMoment("experts.gate", "input")
        return self


@dataclass(frozen=True)
class LayerSamples(Need):
    """Hidden states that enter the layer: the first sequences, in the forward's dtype [n, T, H].

    Attributes:
        tokens: How many at least (whole sequences are kept).
    """

    tokens: int = 4096
