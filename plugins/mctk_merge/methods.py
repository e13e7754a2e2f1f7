"""The merges: how each forms its groups, what it needs and its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from mctk_merge.merging import GroupMerge, GroupOptions, seed_of

if TYPE_CHECKING:
    from mctk.hookspecs import Layer
    from mctk.statistics import Need
    from mctk.terms import BankShape


class MSmoeOptions(GroupOptions):
    """Options of `m_smoe`."""

    align: bool = Field(
        default=True,
        description="first bring each expert's intermediate neurons into the order of its dominant "
        "expert's",
    )


class MSmoe(GroupMerge):
    """The most used experts lead; the others join whom the router confuses them with.

    M-SMoE (arXiv 2310.01334), section 3.1 and Algorithm 1 without its compression and fine-tuning.
    """

    name = "m_smoe"
    summary = "The most used experts take in those with the most similar router logits (M-SMoE)."
    reference = "arXiv 2310.01334"
    Options = MSmoeOptions

    def needs(self, shape: BankShape, bank: str, options: GroupOptions) -> list[Need]:
        """How often each expert was chosen, and the moment of the router's logits."""
        from mctk.statistics import ExpertFrequency, RouterLogits

        return [ExpertFrequency(), RouterLogits()]

    def groups(
        self, layer: int, experts: int, statistics: Any, count: int, options: GroupOptions
    ) -> list[list[int]]:
        """Every expert that is not dominant joins the dominant one with the nearest logits."""
        from mctk.linalg import cosines
        from mctk.statistics import ExpertFrequency, RouterLogits

        from mctk_merge.grouping import around, dominant

        leaders = dominant(statistics[ExpertFrequency()], count)
        # Equation 1: the cosine of two columns of logits.
        return around(leaders, cosines(statistics[RouterLogits()].value[0].double()))

    def curve(self, banks: Layer, statistics: Any, options: GroupOptions) -> list[float]:
        """The share of routed tokens that the dominant experts do not get.

        With `allocate: by_score` the step from n to n + 1 groups is worth the share of the expert
        that becomes dominant: one threshold on that share, for all layers ("Adaptive Layer-Wise
        Merging Ratio" in M-SMoE's section 3.1).
        """
        from mctk.statistics import ExpertFrequency

        from mctk_merge.grouping import uncovered

        return uncovered(statistics[ExpertFrequency()])


class HcSmoeOptions(GroupOptions):
    """Options of `hc_smoe`."""

    linkage: Literal["average", "complete", "ward", "single"] = Field(
        default="average",
        description="how far apart two clusters are: the mean, largest or smallest distance of "
        "their members, or by how much their variance grows (ward)",
    )
    metric: Literal["euclidean", "cosine"] = Field(
        default="euclidean", description="the distance of two experts' mean outputs"
    )

    @model_validator(mode="after")
    def _consistent(self) -> HcSmoeOptions:
        if self.linkage == "ward" and self.metric != "euclidean":
            raise ValueError("linkage: ward needs metric: euclidean")
        return self


class HcSmoe(GroupMerge):
    """Hierarchical clusters of what the experts put out on the same tokens.

    HC-SMoE (arXiv 2410.08589), "Hierarchical Clustering of Experts".
    """

    name = "hc_smoe"
    summary = "Hierarchical clusters of the experts' mean outputs over all tokens (HC-SMoE)."
    reference = "arXiv 2410.08589"
    Options = HcSmoeOptions

    def needs(self, shape: BankShape, bank: str, options: GroupOptions) -> list[Need]:
        """The mean output of every expert over all tokens beside what all merges need."""
        from mctk.statistics import ExpertMeans

        return [*super().needs(shape, bank, options), ExpertMeans()]

    def groups(
        self, layer: int, experts: int, statistics: Any, count: int, options: HcSmoeOptions
    ) -> list[list[int]]:
        """The tree of clusters, cut where it has `count`."""
        from mctk.statistics import ExpertMeans

        from mctk_merge.grouping import by_distance

        return by_distance(statistics[ExpertMeans()], count, options.linkage, options.metric)


class AverageOptions(GroupOptions):
    """Options of `average`."""

    group_by: Literal["random", "router"] = Field(
        default="random",
        description="random: groups of equal size, drawn; router: clusters by the cosine of the "
        "experts' router logits (average linkage)",
    )
    seed: int = Field(default=0, ge=0, description="group_by: random draws other groups by it")

    @model_validator(mode="after")
    def _have_effect(self) -> AverageOptions:
        if "seed" in self.model_fields_set and self.group_by != "random":
            raise ValueError(f"seed has no effect with group_by: {self.group_by}; leave it out")
        return self


class Average(GroupMerge):
    """A baseline: what grouping is worth must be measured against groups at random."""

    name = "average"
    summary = "Groups at random, or by router logits, averaged by frequency: a baseline."
    Options = AverageOptions

    def needs(self, shape: BankShape, bank: str, options: AverageOptions) -> list[Need]:
        """The moment of the router's logits where groups go by it."""
        from mctk.statistics import RouterLogits

        own: list[Need] = [RouterLogits()] if options.group_by == "router" else []
        return [*super().needs(shape, bank, options), *own]

    def groups(
        self, layer: int, experts: int, statistics: Any, count: int, options: AverageOptions
    ) -> list[list[int]]:
        """Drawn, or clustered by the router's logits."""
        from mctk.linalg import cosines
        from mctk.statistics import RouterLogits

        from mctk_merge.grouping import at_random, by_similarity

        if options.group_by == "random":
            return at_random(experts, count, seed_of(layer, options.seed))
        return by_similarity(cosines(statistics[RouterLogits()].value[0].double()), count)
