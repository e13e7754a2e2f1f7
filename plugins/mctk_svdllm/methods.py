"""SVD-LLM as a method; its whitening is that of `mctk.decompose.moments`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mctk import decompose
from mctk.decompose import MomentOptions
from mctk.hookspecs import Method
from pydantic import Field

if TYPE_CHECKING:
    from mctk.decompose import Truncatable
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, Dense, Term


class SvdLlmOptions(MomentOptions):
    """Options of `svd_llm`."""

    update: bool = Field(
        default=False,
        description="fit U anew on the activations that the compressed layers before pass on; "
        "layer after layer, so it takes two more forwards of the calibration text",
    )


class SvdLlm(Method):
    """SVD in the metric of the tokens that each matrix sees: SVD-LLM (W), without its tuning.

    SVD-LLM, Wang et al., ICLR 2025 (arXiv 2403.07378v5), section 3.1 with Theorem 3.2 and Corollary
    3.3; Algorithms 1 and 2. Its LoRA rounds (section 3.2, eq. 7) are not here.
    """

    stage = "decompose"
    name = "svd_llm"
    summary = "Truncation-aware whitened SVD: the least output error on each expert's own tokens."
    reference = "arXiv 2403.07378"
    Options = SvdLlmOptions
    takes_size = True

    def needs(self, shape: BankShape, bank: str, options: SvdLlmOptions) -> list[Need]:
        """X Xᵀ for every member of the bank (Algorithm 2), and for the update another."""
        need = decompose.moment_need(bank, shape)
        return [need, dataclasses.replace(need, of="compressed")] if options.update else [need]

    def sizes(self, banks: Layer, options: SvdLlmOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense."""
        return decompose.sizes(banks, options)

    def layout(self, banks: Layer, size: int | None, options: SvdLlmOptions) -> Terms:
        """Two factors for every member."""
        return decompose.layout(banks, size, options)

    def curve(self, banks: Layer, statistics: Any, options: SvdLlmOptions) -> list[float]:
        """Squared error of the bank's output over all its tokens: tails of σ² (eq. 6), summed."""
        bank = decompose.only(banks)
        settings, _ = self.sizes(banks, options)
        total = [0.0] * len(settings)
        parts = decompose.decompositions(bank, decompose.matrices(bank), statistics, options)
        for part, weight in decompose.name_errors(bank, parts):
            for k, error in enumerate(decompose.tail_errors(part.spectrum, settings)):
                total[k] += weight * error
        return total

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: SvdLlmOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by those of rank `size` with the least output error."""
        dense = decompose.matrices(bank)
        parts: Iterator[Truncatable] = (
            part for part, _ in decompose.decompositions(bank, dense, statistics, options)
        )
        if options.update:
            parts = self._updated(bank, dense, statistics, options, parts)
        return decompose.replace(bank, dense, parts, size, options)

    def _updated(
        self,
        bank: Bank,
        dense: Dense,
        statistics: Any,
        options: SvdLlmOptions,
        parts: Iterator[Truncatable],
    ) -> Iterator[Truncatable]:
        """The same decompositions, their U fitted to the compressed prefix's activations."""
        from mctk_svdllm.math import UpdatedSVD

        need = decompose.moment_need(bank.name, bank.shape)
        later = statistics[dataclasses.replace(need, of="compressed")]
        moments = decompose.slot_moments(bank, dense, later, need.side, options)
        for weight, part, (moment, _) in zip(dense.weight, parts, moments, strict=True):
            yield UpdatedSVD(part, weight, moment, need.side)
