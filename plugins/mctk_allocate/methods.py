"""The allocators as methods: curves in, an index into each curve's settings out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field

from mctk_allocate import math

if TYPE_CHECKING:
    from mctk.terms import SizeCurve


class Uniform(Method):
    """The same fraction of its own size for every item, as most papers do.

    SVD-LLM (arXiv 2403.07378v5, Appendix A.8): one compression ratio for all weight matrices.
    """

    stage = "allocate"
    name = "uniform"
    summary = "Every bank keeps the same fraction of its own size; the remainder is spread evenly."

    def allocate(
        self, curves: list[SizeCurve], budget: int, options: Any
    ) -> dict[tuple[int, int, str], int]:
        """Needs the curves' costs only, so a plan knows the outcome before any data is read."""
        costs = [curve.cost for curve in curves]
        try:
            choice = math.uniform(costs, budget)
        except math.Infeasible as error:
            raise too_small(budget, error) from None
        return by_item(curves, choice)


class ByLossOptions(MethodOptions):
    """Options of `by_loss`."""

    min_keep: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="every bank keeps at least this fraction of its own size",
    )


class ByLoss(Method):
    """The least summed error that the budget can buy, from the methods' own size curves.

    Of no paper on compressing models: a multiple-choice knapsack by Lagrange multipliers, as in
    Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers" (1988).
    """

    stage = "allocate"
    name = "by_loss"
    summary = "Minimises the summed squared error of all banks within the budget."
    Options = ByLossOptions
    needs_curves = True

    def allocate(
        self, curves: list[SizeCurve], budget: int, options: ByLossOptions
    ) -> dict[tuple[int, int, str], int]:
        """Trades every bank of every layer against every other, whatever method each one uses."""
        costs, errors = [], []
        for curve in curves:
            if curve.error is None:
                _, layer, bank = curve.item
                raise UserError(
                    f"allocate/by_loss needs squared errors per size, and the method for {bank} in "
                    f"layer {layer} gives none: use allocate/uniform"
                )
            costs.append(curve.cost)
            errors.append(curve.error)
        try:
            choice = math.by_loss(costs, errors, budget, math.floors(costs, options.min_keep))
        except math.Infeasible as error:
            raise too_small(budget, error, options.min_keep) from None
        return by_item(curves, choice)


class ByScore(Method):
    """One threshold for all layers, on what each more of a setting is worth to its method.

    M-SMoE (arXiv 2310.01334, section 3.1, "Adaptive Layer-Wise Merging Ratio") chooses its dominant
    experts so: those whose share of the routed tokens is above one number, in whatever layer.
    """

    stage = "allocate"
    name = "by_score"
    summary = "One threshold over all layers on the scores of one method, such as merge/m_smoe."
    reference = "arXiv 2310.01334"
    needs_curves = True
    units = "score"

    def allocate(
        self, curves: list[SizeCurve], budget: int, options: Any
    ) -> dict[tuple[int, int, str], int]:
        """Takes the steps that lower a score most; a recipe is refused if it mixes methods."""
        scores = []
        for curve in curves:
            if curve.error is None:
                _, layer, bank = curve.item
                raise UserError(
                    f"allocate/by_score needs a score per size, and the method for {bank} in layer "
                    f"{layer} gives none: use allocate/uniform"
                )
            scores.append(curve.error)
        try:
            choice = math.by_score([curve.cost for curve in curves], scores, budget)
        except math.Infeasible as error:
            raise too_small(budget, error) from None
        return by_item(curves, choice)


def by_item(curves: list[SizeCurve], choice: list[int]) -> dict[tuple[int, int, str], int]:
    """What `allocate` returns, of a list of settings' indices."""
    return {curve.item: k for curve, k in zip(curves, choice, strict=True)}


def too_small(budget: int, error: math.Infeasible, min_keep: float = 0.0) -> UserError:
    """The error that says what can be had."""
    because = f" with min_keep {min_keep:g}" if min_keep else ""
    return UserError(
        f"the budget leaves {budget:,} for the steps of size auto, but their smallest sizes"
        f"{because} need {error.smallest:,}: raise the budget, or target fewer banks"
    )
