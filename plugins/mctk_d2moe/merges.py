"""The merges: what of each is its own, the statistics it needs and its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mctk.decompose import part_of
from pydantic import Field

from mctk_d2moe.merging import Merge, MergeOptions, seed_of

if TYPE_CHECKING:
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape
    from torch import Tensor


class Mean(Merge):
    """Every expert counts the same."""

    name = "mean"
    summary = "The base is the mean of the experts; needs no data."

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """The mean."""
        from mctk_d2moe.base import weighted

        return weighted(weight, members)


class FrequencyMerge(Merge):
    """Every expert counts as often as the router chose it."""

    name = "frequency"
    summary = "The base is the experts' mean, weighted by how many tokens each one gets."
    uses_frequency = True

    def prepare(
        self, bank: Bank, statistics: Any, options: Any, order: Tensor | None
    ) -> dict[str, Any]:
        """The frequencies."""
        from mctk.statistics import ExpertFrequency

        return {"scale": statistics[ExpertFrequency()]}

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """The mean by frequency; the plain one where no member saw a token."""
        from mctk_d2moe.base import weighted

        return weighted(weight, members, scale=extra["scale"])


class FisherOptions(MergeOptions):
    """Options of `fisher`."""

    frequency: bool = Field(
        default=True,
        description="multiply an expert's Fisher information by its frequency, as the authors' "
        "code does (their figures come from it); false is the paper's eq. 5",
    )
    labels: Literal["data", "model"] = Field(
        default="data",
        description="whose next token the loss is taken for: the text's own (the authors' code) or "
        "one drawn from the model (the paper's eq. 4)",
    )


class FisherMerge(Merge):
    """Every element of every expert counts by how much the loss depends on it: D²-MoE's own."""

    name = "fisher"
    summary = "The base is the experts' mean, weighted elementwise by Fisher information (D²-MoE)."
    reference = "arXiv 2502.17298, eq. 4 and 5"
    Options = FisherOptions
    uses_frequency = True

    def needs(self, shape: BankShape, bank: str, options: Any) -> list[Need]:
        """Squared gradients of every matrix beside what all merges need."""
        from mctk.statistics import Fisher

        return [*super().needs(shape, bank, options), Fisher(bank, labels=options.labels)]

    def prepare(
        self, bank: Bank, statistics: Any, options: FisherOptions, order: Tensor | None
    ) -> dict[str, Any]:
        """Fisher information in the neurons' order, and frequencies."""
        from mctk.linalg import reorder
        from mctk.statistics import ExpertFrequency, Fisher

        fisher = statistics[Fisher(bank.name, labels=options.labels)]
        scale = statistics[ExpertFrequency()] if options.frequency else None
        return {"importance": reorder(fisher, part_of(bank.name), order), "scale": scale}

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """``Σ a_e ⊙ W_e`` with ``a_e = f_e F_e / Σ_j f_j F_j``."""
        from mctk_d2moe.base import weighted

        return weighted(weight, members, **extra)


class RegMeanOptions(MergeOptions):
    """Options of `regmean`."""

    off_diagonal: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="what the inputs' moments keep off their diagonal (RegMean recommends less "
        "than 1; at 1 the base is the least-squares one)",
    )


class RegMean(Merge):
    """The base whose outputs are nearest to the experts' own.

    The moments of what enters down are large where experts are: 6.6 GB for a layer of Mixtral.
    """

    name = "regmean"
    summary = "The base fits the experts' outputs best; needs down's input moments too [E, I, I]."
    reference = "arXiv 2212.09849"
    Options = RegMeanOptions

    def needs(self, shape: BankShape, bank: str, options: Any) -> list[Need]:
        """The input moment of every expert, of the down bank as well."""
        from mctk.statistics import SecondMoment

        own = SecondMoment(bank, "input")
        return list(dict.fromkeys([*super().needs(shape, bank, options), own]))

    def prepare(
        self, bank: Bank, statistics: Any, options: RegMeanOptions, order: Tensor | None
    ) -> dict[str, Any]:
        """The moments in the neurons' order."""
        from mctk.statistics import SecondMoment

        from mctk_d2moe.align import reorder_moment

        moment = statistics[SecondMoment(bank.name, "input")].value
        if part_of(bank.name) == "down":
            moment = reorder_moment(moment, order)
        return {"moment": moment, "off_diagonal": options.off_diagonal}

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """``(Σ W_e G_e) (Σ G_e)⁻¹``."""
        from mctk_d2moe.base import regmean

        return regmean(weight, members, **extra)


class TiesOptions(MergeOptions):
    """Options of `ties`."""

    density: float = Field(
        default=0.2,
        gt=0.0,
        le=1.0,
        description="the fraction of each difference from the most frequent expert that stays",
    )


class Ties(Merge):
    """The most frequent expert, moved where the others agree."""

    name = "ties"
    summary = "The base is the most frequent expert plus trimmed differences with elected signs."
    reference = "arXiv 2306.01708"
    Options = TiesOptions
    uses_frequency = True

    def prepare(
        self, bank: Bank, statistics: Any, options: TiesOptions, order: Tensor | None
    ) -> dict[str, Any]:
        """The density."""
        return {"density": options.density}

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """Trim, elect, merge."""
        from mctk_d2moe.base import ties

        return ties(weight, members, anchor, **extra)


class RandomOptions(MergeOptions):
    """Options of `random`."""

    seed: int = Field(default=0, ge=0, description="another seed, other weights")


class RandomMerge(Merge):
    """Random weights: what a merge is worth must be measured against something."""

    name = "random"
    summary = "The base is a mean of the experts with random weights, drawn for every bank."
    Options = RandomOptions

    def prepare(
        self, bank: Bank, statistics: Any, options: RandomOptions, order: Tensor | None
    ) -> dict[str, Any]:
        """The weights."""
        from mctk_d2moe.base import random_scale

        return {"scale": random_scale(bank.shape.members, seed_of(bank, options.seed))}

    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """The weighted mean."""
        from mctk_d2moe.base import weighted

        return weighted(weight, members, **extra)
