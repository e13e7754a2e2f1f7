"""SVD-LLM V2's allocation: within each type of matrix, ratios by what truncation loses.

arXiv 2503.12340v1, section 3.1, Algorithm 1, with the guards that the printed rule lacks; or, as an
option, the marginal rule of which it is a heuristic form.
"""

from __future__ import annotations

import math as numbers
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field

from mctk_allocate import math
from mctk_allocate.methods import by_item, too_small

if TYPE_CHECKING:
    from mctk.terms import SizeCurve


def inverse_log(
    losses: Sequence[float], sizes: Sequence[int], ratio: float, most: Sequence[float]
) -> list[float]:
    """Removed shares of the matrices of one type, in proportion to 1 / log(loss).

    Lines 10 and 11 of Algorithm 1, with the weight in the place of L_min, as its text means. The
    shares' mean, weighted by size, is the ratio. A share above what an item can remove is cut to
    that, and the others take over the rest.

    Args:
        losses: ``L = ‖W X - W' X‖`` of each item at the common ratio; all above e.
        sizes: Parameters of each item.
        ratio: The share that they remove together.
        most: The largest share that each can remove.

    Returns:
        A share from 0 to `most` for each item.

    Raises:
        ValueError: A loss is not above e, where the rule turns round or has no value.
    """
    if min(losses) <= numbers.e:
        raise ValueError(f"1 / log(L) needs losses above e, not {min(losses):.3g}")
    weights = [1 / numbers.log(loss) for loss in losses]
    cut: set[int] = set()
    while True:
        left = ratio * sum(sizes) - sum(sizes[i] * most[i] for i in cut)
        free = [i for i in range(len(sizes)) if i not in cut]
        whole = sum(sizes[i] * weights[i] for i in free)
        scale = left / whole if free else 0.0
        over = {i for i in free if scale * weights[i] > most[i]}
        if not over:
            return [
                most[i] if i in cut else max(0.0, scale * weights[i]) for i in range(len(sizes))
            ]
        cut |= over


def settings_for(costs: math.Costs, wanted: Sequence[float], budget: int) -> list[int]:
    """The largest settings within the wanted costs; what that leaves goes to the furthest below.

    Args:
        costs: Stored size of every setting of every item.
        wanted: What each item should store.
        budget: What all may store together.

    Returns:
        One setting per item, at most one step above the largest one within its wanted cost.

    Raises:
        Infeasible: The smallest settings exceed the budget.
    """
    math.check_feasible(costs, budget, [0] * len(costs))
    # A share of a whole number, computed with a rounding error, may fall just short of a setting.
    exact = [want * (1 + 1e-12) for want in wanted]
    choice = [max(0, bisect_right(cost, e) - 1) for cost, e in zip(costs, exact, strict=True)]
    room = budget - math.total_cost(costs, choice)
    for i in sorted(range(len(costs)), key=lambda i: costs[i][choice[i]] - wanted[i]):
        k = choice[i]
        if k + 1 < len(costs[i]) and costs[i][k + 1] - costs[i][k] <= room:
            room -= costs[i][k + 1] - costs[i][k]
            choice[i] = k + 1
    return choice


class TruncationLossOptions(MethodOptions):
    """Options of `truncation_loss`."""

    rule: Literal["inverse_log", "marginal"] = Field(
        default="inverse_log",
        description="inverse_log: ratios in proportion to 1 / log(loss) within each type of "
        "matrix, as in the paper; marginal: the least summed squared loss, across types",
    )


class TruncationLoss(Method):
    """More of a matrix is kept where truncating it loses more, on the calibration tokens.

    SVD-LLM V2, Wang et al., NAACL 2025 (arXiv 2503.12340v1), section 3.1, Algorithm 1.
    """

    stage = "allocate"
    name = "truncation_loss"
    summary = "SVD-LLM V2's rule: removed shares by 1 / log(loss) within each type of matrix."
    reference = "arXiv 2503.12340"
    Options = TruncationLossOptions
    needs_curves = True

    def allocate(
        self, curves: list[SizeCurve], budget: int, options: TruncationLossOptions
    ) -> dict[tuple[int, int, str], int]:
        """Reads the methods' own errors, summed over all calibration tokens, as the paper does."""
        costs = [curve.cost for curve in curves]
        try:
            if any(curve.raw is None for curve in curves):
                choice = math.uniform(costs, budget)  # a plan asks what is feasible: nothing seen
            elif options.rule == "marginal":
                choice = math.by_loss(costs, [curve.raw or () for curve in curves], budget)
            else:
                choice = self._inverse_log(curves, budget)
        except math.Infeasible as error:
            raise too_small(budget, error) from None
        return by_item(curves, choice)

    def _inverse_log(self, curves: list[SizeCurve], budget: int) -> list[int]:
        """One setting per item by the paper's rule, each type of matrix by itself."""
        costs = [curve.cost for curve in curves]
        math.check_feasible(costs, budget, [0] * len(costs))
        whole = sum(cost[-1] for cost in costs)
        ratio = max(0.0, 1 - budget / whole)
        groups: dict[str, list[int]] = {}
        for i, curve in enumerate(curves):
            groups.setdefault(curve.item[2], []).append(i)
        wanted = [0.0] * len(curves)
        for bank, items in groups.items():
            sizes = [costs[i][-1] for i in items]
            most = [1 - costs[i][0] / costs[i][-1] for i in items]
            losses = [self._loss(curves[i], (1 - ratio) * costs[i][-1]) for i in items]
            try:
                shares = inverse_log(losses, sizes, ratio, most)
            except ValueError as error:
                layer = curves[items[losses.index(min(losses))]].item[1]
                raise UserError(
                    f"allocate/truncation_loss: {bank} of layer {layer} loses "
                    f"{min(losses):.3g} at the target size, and {error}: the loss is a sum over "
                    "all calibration tokens, so calibrate on more text, or use rule: marginal or "
                    "allocate/by_loss"
                ) from None
            for i, share in zip(items, shares, strict=True):
                wanted[i] = (1 - share) * costs[i][-1]
        return settings_for(costs, wanted, budget)

    def _loss(self, curve: SizeCurve, cost: float) -> float:
        """``(Σ_{i>r} σ_i²)^½`` at the largest setting within a cost: line 7 of Algorithm 1."""
        assert curve.raw is not None
        return numbers.sqrt(curve.raw[max(0, bisect_right(curve.cost, cost * (1 + 1e-12)) - 1)])
