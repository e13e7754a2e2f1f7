"""Experts leave a layer by a score: random, frequency, router weight, EAN, REAP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mctk_prune.choice import ChoiceOptions
from mctk_prune.selection import Selection

if TYPE_CHECKING:
    from mctk.statistics import Need
    from torch import Tensor

Average = Literal["sum", "mean", "max", "weighted_sum"]
"""What `ean` makes of an expert's norms."""


class RandomOptions(ChoiceOptions):
    """Options of `random`."""

    seed: int = Field(
        default=0, ge=0, description="another seed removes other experts; layers always differ"
    )


class Random(Selection):
    """Removes experts at random: a baseline of NAEE (arXiv 2402.14800, section 4.1)."""

    name = "random"
    summary = "Removes experts at random: what any score has to beat."
    Options = RandomOptions

    def scores(self, layer: int, experts: int, statistics: Any, options: RandomOptions) -> Tensor:
        """See `Selection.scores`."""
        from mctk_prune.math import random_scores

        return random_scores(experts, layer, options.seed)


class Frequency(Selection):
    """Removes the experts that got the fewest tokens.

    A baseline of NAEE (arXiv 2402.14800, section 4.1) and REAP (arXiv 2510.13999, appendix D).
    """

    name = "frequency"
    summary = "Removes the experts that the router chose least often."

    def asks(self, options: ChoiceOptions) -> list[Need]:
        """See `Selection.asks`."""
        from mctk.statistics import ExpertFrequency

        return [ExpertFrequency()]

    def scores(self, layer: int, experts: int, statistics: Any, options: ChoiceOptions) -> Tensor:
        """See `Selection.scores`."""
        return statistics[self.asks(options)[0]].double()


class RouterWeight(Selection):
    """Removes the experts that got the least routing weight.

    The routing score that MoNE (arXiv 2507.00390) compares with; "S-prune" in HC-SMoE (arXiv
    2410.08589), which ranks over all layers.
    """

    name = "router_weight"
    summary = "Removes the experts whose routing weights have the smallest sum."

    def asks(self, options: ChoiceOptions) -> list[Need]:
        """See `Selection.asks`."""
        from mctk.statistics import RouterWeight

        return [RouterWeight()]

    def scores(self, layer: int, experts: int, statistics: Any, options: ChoiceOptions) -> Tensor:
        """See `Selection.scores`."""
        return statistics[self.asks(options)[0]].abs()


class _OfOutputs(Selection):
    """By what the experts give."""

    reference: ClassVar[str] = "arXiv 2510.13999"

    def asks(self, options: ChoiceOptions) -> list[Need]:
        """See `Selection.asks`."""
        from mctk.statistics import ExpertOutputs

        return [ExpertOutputs()]


class EanOptions(ChoiceOptions):
    """Options of `ean`."""

    score: Average = Field(
        default="sum",
        description="over the norms of an expert's outputs: their sum, mean or max, or their sum "
        "weighted by the routing weights",
    )


class Ean(_OfOutputs):
    """Removes the experts whose outputs have the smallest norms (REAP, appendix D, eq. 13)."""

    name = "ean"
    summary = "Removes the experts with the smallest expert activation norm."
    Options = EanOptions

    def scores(self, layer: int, experts: int, statistics: Any, options: EanOptions) -> Tensor:
        """See `Selection.scores`."""
        from mctk_prune.math import output_norms

        return output_norms(statistics[self.asks(options)[0]], options.score)


class Reap(_OfOutputs):
    """Removes the experts that add least where they are chosen (REAP, section 4, eq. 9)."""

    name = "reap"
    summary = "Removes the experts with the smallest mean routing weight times output norm."

    def scores(self, layer: int, experts: int, statistics: Any, options: ChoiceOptions) -> Tensor:
        """See `Selection.scores`."""
        from mctk_prune.math import weighted_norms

        return weighted_norms(statistics[self.asks(options)[0]])
