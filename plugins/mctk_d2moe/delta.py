"""Delta decomposition: what merging left of each expert, as low-rank factors.

Without a merge before it, it decomposes the experts themselves: with `share: none` that is
decompose/svd_llm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.decompose import MomentOptions
from mctk.errors import UserError
from mctk.hookspecs import Method
from pydantic import Field, model_validator

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.linalg import MetricSVD
    from mctk.statistics import Need, SecondMoment
    from mctk.terms import Bank, BankShape, Dense, Term

    Slots = list[int | None]


class DeltaOptions(MomentOptions):
    """Options of `delta_svd`."""

    share: Literal["none", "v", "both"] = Field(
        default="none",
        description="none: U and V for every expert, in the metric of its own tokens; v: one V for "
        "all, in the metric of all tokens together (few_tokens and min_tokens are then refused); "
        "both: the mean of the U as well, so that all experts get the same correction",
    )

    @model_validator(mode="after")
    def _only_own_moments_are_pooled(self) -> DeltaOptions:
        for option in sorted({"few_tokens", "min_tokens"} & self.model_fields_set):
            if self.share != "none":
                raise ValueError(f"{option} has no effect with share: {self.share}; leave it out")
        return self


class DeltaSvd(Method):
    """Truncation-aware SVD of the residuals, with factors per expert or shared: D²-MoE's own."""

    stage = "decompose"
    name = "delta_svd"
    summary = "Whitened SVD of what merging left of each expert; V, or both factors, can be shared."
    reference = "arXiv 2502.17298, tables 6 and 11"
    Options = DeltaOptions
    takes_size = True

    def needs(self, shape: BankShape, bank: str, options: DeltaOptions) -> list[Need]:
        """A second moment for every member; where V is shared one of all inputs."""
        if options.share == "none":
            return [decompose.moment_need(bank, shape)]
        return [_pooled_need(bank)]

    def sizes(self, banks: Layer, options: DeltaOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense. Shared by E experts, V may have more rows than a U has."""
        from mctk.terms import BankShape, rank_settings

        if options.share == "none":
            return decompose.sizes(banks, options)
        if options.share == "both":
            return decompose.sizes(banks, options, 1, 1)
        stored, out, into = decompose.matrices(decompose.only(banks)).weight.shape
        stack = BankShape(1, stored * out, into)
        ranks, costs = rank_settings(
            stack, 1, 1, options.rank_multiple, options.storage, beyond=True
        )
        return list(ranks), list(costs)

    def layout(self, banks: Layer, size: int | None, options: DeltaOptions) -> Terms:
        """Two factors for every member, or fewer where they are shared."""
        if options.share == "none":
            return decompose.layout(banks, size, options)
        dense = decompose.matrices(decompose.only(banks))
        left, right = _slots(dense, options)
        return decompose.layout(banks, size, options, left, right)

    def curve(self, banks: Layer, statistics: Any, options: DeltaOptions) -> list[float]:
        """Squared error of the bank's outputs over its tokens: tails of σ², summed over experts.

        Where V is shared every token counts in every expert, by 1/E: which expert a token reaches
        is what a pooled moment does not know.
        """
        bank = decompose.only(banks)
        settings, _ = self.sizes(banks, options)
        dense = decompose.matrices(bank)
        if options.share != "none":
            spectrum = self._spectrum(bank, dense, statistics, options)
            return decompose.tail_errors(spectrum, settings)
        total = [0.0] * len(settings)
        parts = decompose.decompositions(bank, dense, statistics, options)
        for part, weight in decompose.name_errors(bank, parts):
            for k, error in enumerate(decompose.tail_errors(part.spectrum, settings)):
                total[k] += weight * error
        return total

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: DeltaOptions
    ) -> list[Term]:
        """Replaces the residuals by factors of rank `size` with the least output error."""
        from mctk.terms import DENSE, LowRank

        from mctk_d2moe.shared import split

        dense = decompose.matrices(bank)
        if options.share == "none":
            parts = (part for part, _ in decompose.decompositions(bank, dense, statistics, options))
            return decompose.replace(bank, dense, parts, size, options)
        if size == DENSE:
            return list(bank.terms)
        stored, out, into = dense.weight.shape
        full = min(out, into) if options.share == "both" else min(stored * out, into)
        if size is None or not 1 <= size <= full:
            raise UserError(
                f"{bank.name} of layer {bank.layer}: rank {size} is not between 1 and {full}"
            )
        left, right = _stack(bank, dense, statistics).factors(size, balance=options.balance)
        each = split(left, stored)
        if options.share == "both":
            each = each.mean(0, keepdim=True)
        u_slots, v_slots = _slots(dense, options)
        factors = LowRank(bank.shape, u_slots, v_slots, U=each, V=right[None])
        term = factors.pivot() if options.storage == "pivoted" else factors
        return [term if other is dense else other for other in bank.terms]

    def _spectrum(self, bank: Bank, dense: Dense, statistics: Any, options: DeltaOptions) -> Any:
        """Returns what each direction of shared factors adds, and what none of them can, last.

        ``[n + 1]`` for a mean of the U, whose full rank still loses; ``[n]`` for U per expert.
        """
        import torch

        from mctk_d2moe.shared import averaged_spectrum

        part = _stack(bank, dense, statistics)
        if options.share == "v":
            return part.spectrum
        gains = averaged_spectrum(part, dense.weight.shape[0])
        lost = (part.spectrum.sum() - gains.sum()).clamp(min=0)
        return torch.cat([gains, lost[None]])


def _pooled_need(bank: str) -> SecondMoment:
    """The input moment of all members together; neurons that enter down may have been reordered."""
    from mctk.statistics import SecondMoment

    moved = bank == "experts.down"
    return SecondMoment(bank, "input", of="current" if moved else "original", pooled=True)


def _slots(dense: Dense, options: DeltaOptions) -> tuple[Slots, Slots]:
    """Returns the slot maps of U and V where at least V is shared."""
    one: Slots = [None if slot is None else 0 for slot in dense.slots]
    return (one if options.share == "both" else list(dense.slots)), one


def _stack(bank: Bank, dense: Dense, statistics: Any) -> MetricSVD:
    """Returns the decomposition of the residuals on top of each other, tokens shared evenly.

    Raises:
        UserError: No token reached the bank, or a tensor holds bad numbers.
    """
    from mctk_d2moe.shared import stacked

    moment = statistics[_pooled_need(bank.name)]
    if not int(moment.count.sum()):
        raise UserError(f"{bank.name} of layer {bank.layer}: no calibration token reached it")
    try:
        return stacked(dense.weight, moment.value[0].double() / dense.weight.shape[0])
    except ValueError as error:
        raise UserError(f"{bank.name} of layer {bank.layer}: {error}") from error
