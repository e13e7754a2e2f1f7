"""Dynamic expert skipping: a policy of the run time, calibrated on routing weights.

NAEE (arXiv 2402.14800), section 3.3, for two experts a token. For more its appendix A.2 has another
rule, one threshold for the sum of the weights that are skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import BankShape, Term
    from torch import Tensor

DOWN = "experts.down"


class SkipOptions(MethodOptions):
    """Options of `skip_experts`."""

    tokens: int = Field(
        default=16384,
        ge=1,
        description="on how many calibration tokens, the first ones, routing weights are compared",
    )
    quantile: float = Field(
        default=0.5,
        gt=0.0,
        le=1.0,
        description="the threshold is this quantile of w_j / w_1 over the tokens (the paper: the "
        "median), so the share of tokens that skip",
    )


class SkipExperts(Method):
    """A token's lesser experts are not computed where their weight is small beside the first's.

    NAEE, section 3.3: the second of two, where ``w_2 < β w_1``, β the median of ``w_2 / w_1``.
    """

    stage = "prune"
    name = "skip_experts"
    scope = "experts"
    summary = "At run time skips a token's second expert if its weight is small (NAEE)."
    reference = "arXiv 2402.14800"
    Options = SkipOptions

    def needs(self, shape: BankShape, bank: str, options: SkipOptions) -> list[Need]:
        """The router among the experts that the steps before left, on calibration tokens."""
        from mctk.statistics import RoutedOutputs

        return [RoutedOutputs(options.tokens)] if bank == DOWN else []

    def layout(self, banks: Layer, size: int | None, options: SkipOptions) -> Terms:
        """Nothing more is stored; whom the policy skips, data will tell."""
        from mctk.terms import ExpertSkip

        _check(banks)
        return {DOWN: [*banks[DOWN].terms, ExpertSkip(banks[DOWN].shape)]}

    def prune(self, layer: Layer, statistics: Any, size: int | None, options: SkipOptions) -> Terms:
        """Adds the policy to the bank of down."""
        from mctk.statistics import RoutedOutputs
        from mctk.terms import ExpertSkip, removed_members

        _check(layer)
        bank = layer[DOWN]
        gone = removed_members(layer.values())
        present = [e for e in range(bank.shape.members) if e not in gone]
        _, weights = statistics[RoutedOutputs(options.tokens)].route(present)
        if weights.shape[1] < 2:
            raise UserError(
                f"prune/skip_experts in layer {bank.layer}: a token chooses one expert, and it "
                "cannot be skipped"
            )
        ratios = thresholds(weights, options.quantile)
        policy = ExpertSkip(bank.shape, ratios, shares(weights, ratios, bank.shape))
        mean = sum(n * share for n, share in enumerate(policy.shares, 1))
        note(
            f"skips ranks 2 to {weights.shape[1]} below "
            f"{', '.join(f'{ratio:.4g}' for ratio in ratios)} of the first weight: {mean:.3f} of "
            f"{weights.shape[1]} experts a token"
        )
        terms: list[Term] = [*bank.terms, policy]
        return {DOWN: terms}


def thresholds(weights: Tensor, quantile: float) -> list[float]:
    """For each rank after the first a quantile of its weight over the first, ``β_2 ... β_k``.

    Of two experts and with the quantile 0.5 that is NAEE's β (section 3.3 and appendix A.7).

    Between two values it is their mean by distance: the median of an even number is the mean of the
    middle two. Tokens whose weights are all zero have no say.

    Args:
        weights: Routing weights, ``[T, k]``, in any order.
        quantile: From 0 to 1.
    """
    ranked = weights.double().sort(dim=1, descending=True).values
    ranked = ranked[ranked[:, 0] > 0]
    if not ranked.shape[0]:
        return [0.0] * (weights.shape[1] - 1)
    ratios = (ranked[:, 1:] / ranked[:, :1]).sort(dim=0).values
    place = quantile * (ratios.shape[0] - 1)
    low = int(place)
    high = min(low + 1, ratios.shape[0] - 1)
    return ratios[low].lerp(ratios[high], place - low).tolist()


def shares(weights: Tensor, ratios: list[float], shape: BankShape) -> list[float]:
    """Of the tokens the shares for which 1, 2, ..., k experts are computed."""
    import torch
    from mctk.terms import ExpertSkip

    k = weights.shape[1]
    trial = ExpertSkip(shape, ratios, [0.0] * (k - 1) + [1.0])
    computed = trial.skip(weights)[1].sum(dim=1)
    counts = torch.bincount(computed, minlength=k + 1)[1:].double()
    return (counts / counts.sum()).tolist()


def _check(layer: Layer) -> None:
    """Refuses a second policy."""
    from mctk.terms import ExpertSkip

    if any(isinstance(term, ExpertSkip) for term in layer[DOWN].terms):
        raise UserError(f"layer {layer[DOWN].layer} skips experts already: one such step is enough")
