"""SVD-LLM as a method: its options, the statistics it needs, the policy for rare experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.decompose import LowRankOptions
from mctk.errors import UserError
from mctk.hookspecs import Method
from pydantic import Field

if TYPE_CHECKING:
    from mctk.linalg import MetricSVD
    from mctk.statistics import Moment, Need
    from mctk.terms import Bank, BankShape, Dense, Term


class SvdLlmOptions(LowRankOptions):
    """Options of `svd_llm`."""

    few_tokens: Literal["pooled", "error", "keep"] = Field(
        default="pooled",
        description="an expert that saw fewer than min_tokens: pooled adds average tokens of its "
        "layer, error stops, keep uses what there is (plain SVD for an expert without any token)",
    )
    min_tokens: int | None = Field(
        default=None,
        ge=1,
        description="how many tokens are enough (default: the moment's dimension, below which it "
        "is singular)",
    )


def moment_side(shape: BankShape) -> Literal["input", "output"]:
    """Returns the side of a bank on which its second moment is taken.

    Both sides give the same factors, so the smaller one is taken; but where the input is at most
    twice as wide as the output it stays the input's, which gate and up, and other methods, share.
    """
    return "input" if shape.in_features <= 2 * shape.out_features else "output"


class SvdLlm(Method):
    """SVD in the metric of the tokens that each matrix sees: SVD-LLM (W), without its tuning."""

    stage = "decompose"
    name = "svd_llm"
    summary = "Truncation-aware whitened SVD: the least output error on each expert's own tokens."
    reference = "arXiv 2403.07378"
    Options = SvdLlmOptions
    takes_size = True

    def needs(self, shape: BankShape, bank: str, options: SvdLlmOptions) -> list[Need]:
        """One second moment for every member of the bank."""
        from mctk.statistics import SecondMoment

        return [SecondMoment(bank, moment_side(shape))]

    def sizes(self, shape: BankShape, options: SvdLlmOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense."""
        return decompose.sizes(shape, options)

    def layout(self, shape: BankShape, size: int | None, options: SvdLlmOptions) -> list[Term]:
        """Two factors for every member."""
        return decompose.layout(shape, size, options)

    def curve(self, bank: Bank, statistics: Any, options: SvdLlmOptions) -> list[float]:
        """Squared error of the bank's output over all its tokens: tails of σ², summed."""
        settings, _ = self.sizes(bank.shape, options)
        total = [0.0] * len(settings)
        parts = _decompositions(bank, decompose.matrices(bank), statistics, options)
        for part, weight in decompose.name_errors(bank, parts):
            for k, error in enumerate(decompose.tail_errors(part.spectrum, settings)):
                total[k] += weight * error
        return total

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: SvdLlmOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by those of rank `size` with the least output error."""
        dense = decompose.matrices(bank)
        parts = (part for part, _ in _decompositions(bank, dense, statistics, options))
        return decompose.replace(bank, dense, parts, size, options)


def _decompositions(
    bank: Bank, dense: Dense, statistics: Any, options: SvdLlmOptions
) -> Iterator[tuple[MetricSVD, float]]:
    """Yields for each slot its decomposition and how much of its moment real tokens gave.

    Members that share a slot (merged experts) share the sum of their moments.
    """
    from mctk.statistics import SecondMoment

    from mctk_svdllm import math

    side = moment_side(bank.shape)
    moment: Moment = statistics[SecondMoment(bank.name, side)]
    groups = decompose.members_of_slots(dense)
    if side == "output" and not _is_original(bank, dense):
        raise UserError(
            f"{bank.name} of layer {bank.layer}: its moment is that of the original matrices' "
            "outputs, so decompose/svd_llm cannot follow a merge here"
        )
    least = options.min_tokens or moment.value.shape[-1]
    counts = [int(moment.count[group].sum()) for group in groups]
    _check_tokens(bank, groups, counts, least, options.few_tokens)

    mean_energy = float(moment.value.diagonal(dim1=1, dim2=2).sum()) / int(moment.count.sum())
    mean = moment.pooled().to(dense.device)
    for slot, group in enumerate(groups):
        weight, count = dense.weight[slot], counts[slot]
        value = moment.value[group].sum(0).to(weight.device)
        if options.few_tokens != "pooled":
            yield math.decomposition(weight, value, side), float(count > 0)
            continue
        if side == "input":
            value = math.pooled_inputs(value, count, least, mean)
        else:
            value = math.pooled_outputs(value, count, least, weight, mean_energy)
        yield math.decomposition(weight, value, side), math.seen(count, least)


def _is_original(bank: Bank, dense: Dense) -> bool:
    """Whether every member still has a matrix of its own, with at most a bias beside it."""
    from mctk.terms import Bias

    alone = all(term is dense or isinstance(term, Bias) for term in bank.terms)
    return alone and list(dense.slots) == list(range(bank.shape.members))


def _check_tokens(
    bank: Bank, groups: list[list[int]], counts: list[int], least: int, policy: str
) -> None:
    """Raises for experts that saw too little where the policy forbids it, or no token at all."""
    place = f"{bank.name} of layer {bank.layer}"
    if not sum(counts):
        raise UserError(f"{place}: no calibration token reached it")
    few = [
        f"{'+'.join(map(str, group))} ({count})"
        for group, count in zip(groups, counts, strict=True)
        if count < least
    ]
    if few and policy == "error":
        raise UserError(
            f"{place}: members that saw fewer than {least} tokens: {', '.join(few)}; calibrate on "
            "more text, lower min_tokens, or set few_tokens to pooled or keep"
        )
