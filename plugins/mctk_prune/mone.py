"""MoNE: an expert that hardly varies, or is hardly used, becomes the constant that it gives.

arXiv 2507.00390: the redundancy score is its output variance times its access frequency, here the
sum of routing weights as in the authors' code, and the "novice" its mean output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk.notes import note
from pydantic import Field

from mctk_prune.choice import ChoiceOptions, present
from mctk_prune.selection import Selection

if TYPE_CHECKING:
    from mctk.hookspecs import Layer
    from mctk.statistics import Need
    from torch import Tensor


class MoneOptions(ChoiceOptions):
    """Options of `mone`."""

    score: Literal["both", "variation", "weight"] = Field(
        default="both",
        description="what an expert's importance is: the variation of its outputs (norm of their "
        "standard deviations), the sum of its routing weights, or their product",
    )


class Mone(Selection):
    """Replaces the experts of the lowest scores by their mean outputs.

    The constant is a `Bias` term of down. It takes part in the layer's sum with the routing weight
    of its expert, and the router stays as it is: it may choose any number from any group, and
    layers may differ in how many experts they keep.
    """

    name = "mone"
    summary = "Replaces experts of small variation and little use by their mean outputs."
    reference = "arXiv 2507.00390"
    same_size = False
    Options = MoneOptions

    def asks(self, options: MoneOptions) -> list[Need]:
        """See `Selection.asks`."""
        from mctk.statistics import ExpertOutputs, RouterWeight

        return [ExpertOutputs(), *([] if options.score == "variation" else [RouterWeight()])]

    def scores(self, layer: int, experts: int, statistics: Any, options: MoneOptions) -> Tensor:
        """See `Selection.scores`."""
        from mctk.statistics import ExpertOutputs, RouterWeight

        from mctk_prune.math import variations

        if options.score == "weight":
            return statistics[RouterWeight()].abs()
        found = variations(statistics[ExpertOutputs()])
        return found if options.score == "variation" else found * statistics[RouterWeight()].abs()

    def groups(self, banks: Layer) -> int:
        """One: to the router no expert is missing."""
        return 1

    def left_of_one(self, banks: Layer) -> int:
        """H."""
        return banks[_down(banks)].shape.out_features

    def left(self, banks: Layer, kept: list[int], statistics: Any) -> dict[str, list[Any]]:
        """The banks' terms without the other experts, and with their mean outputs."""
        import torch
        from mctk.statistics import ExpertOutputs
        from mctk.terms import Bias

        from mctk_prune.math import mean_outputs

        found, down = super().left(banks, kept, statistics), _down(banks)
        shape, own = banks[down].shape, found[down][0]
        gone = [expert for expert in present(banks) if expert not in kept]
        if statistics is None:
            vectors = torch.empty(len(gone), shape.out_features, device="meta")
        else:
            vectors = mean_outputs(statistics[ExpertOutputs()])[gone].to(own.device)
            note(f"{len(gone)} experts became constants: {', '.join(map(str, gone))}")
        slots = [gone.index(expert) if expert in gone else None for expert in range(shape.members)]
        found[down].append(Bias(shape, slots, vectors.to(own.dtype)))
        return found


def _down(banks: Layer) -> str:
    return next(name for name in banks if name.endswith(".down"))
