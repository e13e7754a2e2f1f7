"""SVD-LLM as a method; its mathematics is that of `mctk.decompose.moments`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mctk import decompose
from mctk.decompose import MomentOptions
from mctk.hookspecs import Method

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, Term


class SvdLlm(Method):
    """SVD in the metric of the tokens that each matrix sees: SVD-LLM (W), without its tuning."""

    stage = "decompose"
    name = "svd_llm"
    summary = "Truncation-aware whitened SVD: the least output error on each expert's own tokens."
    reference = "arXiv 2403.07378"
    Options = MomentOptions
    takes_size = True

    def needs(self, shape: BankShape, bank: str, options: MomentOptions) -> list[Need]:
        """One second moment for every member of the bank."""
        return [decompose.moment_need(bank, shape)]

    def sizes(self, banks: Layer, options: MomentOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense."""
        return decompose.sizes(banks, options)

    def layout(self, banks: Layer, size: int | None, options: MomentOptions) -> Terms:
        """Two factors for every member."""
        return decompose.layout(banks, size, options)

    def curve(self, banks: Layer, statistics: Any, options: MomentOptions) -> list[float]:
        """Squared error of the bank's output over all its tokens: tails of σ², summed."""
        bank = decompose.only(banks)
        settings, _ = self.sizes(banks, options)
        total = [0.0] * len(settings)
        parts = decompose.decompositions(bank, decompose.matrices(bank), statistics, options)
        for part, weight in decompose.name_errors(bank, parts):
            for k, error in enumerate(decompose.tail_errors(part.spectrum, settings)):
                total[k] += weight * error
        return total

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: MomentOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by those of rank `size` with the least output error."""
        dense = decompose.matrices(bank)
        parts = (part for part, _ in decompose.decompositions(bank, dense, statistics, options))
        return decompose.replace(bank, dense, parts, size, options)
