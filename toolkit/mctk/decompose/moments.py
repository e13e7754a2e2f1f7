"""Second moments as the metric of a decomposition, and the policy for members that saw few tokens.

The error of an approximation on the calibration tokens, ``‖(W - W_r) X‖²``, is a Frobenius norm in
the metric of ``C = X Xᵀ``; `mctk.linalg.metric_svd` finds its minimum over rank r from C or, the
same, from the moment ``A = W C Wᵀ`` of the outputs (arXiv 2403.07378 calls it truncation-aware).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mctk.decompose.lowrank import LowRankOptions, members_of_slots
from mctk.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mctk.linalg import MetricSVD
    from mctk.statistics import Moment, SecondMoment
    from mctk.terms import Bank, BankShape, Dense


class MomentOptions(LowRankOptions):
    """Options of every low-rank method that works in the metric of second moments."""

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


def moment_need(bank: str, shape: BankShape) -> SecondMoment:
    """Returns the second moment in which a bank's matrices are to be decomposed.

    What enters gate and up, and other layers, is the same whatever the steps before did. What the
    matrices put out is not, nor is what enters down: an expert's neurons may have been reordered.
    """
    from mctk.statistics import SecondMoment

    side = moment_side(shape)
    current = side == "output" or bank == "experts.down"
    return SecondMoment(bank, side, of="current" if current else "original")


def decompositions(
    bank: Bank, dense: Dense, statistics: Any, options: MomentOptions
) -> Iterator[tuple[MetricSVD, float]]:
    """Yields for each slot its decomposition and how much of its moment real tokens gave.

    Members that share a slot (merged experts) share the sum of their moments.

    Args:
        bank: The bank.
        dense: Its term to decompose, as `matrices` found it.
        statistics: Holds the bank's `moment_need`.
        options: What to do with members that saw few tokens.

    Raises:
        UserError: No token reached the bank; or too few reached a member, and options forbid that.
    """
    from mctk.linalg import metric_svd

    need = moment_need(bank.name, bank.shape)
    values = slot_moments(bank, dense, statistics[need], need.side, options)
    for weight, (value, fraction) in zip(dense.weight, values, strict=True):
        if need.side == "input":
            yield metric_svd(weight, input_moment=value), fraction
        else:
            yield metric_svd(weight, output_moment=value), fraction


def slot_moments(
    bank: Bank, dense: Dense, moment: Moment, side: str, options: MomentOptions
) -> Iterator[tuple[Tensor, float]]:
    """Yields for each slot its moment [n, n] and how much of it real tokens gave.

    Args:
        bank: The bank.
        dense: Its term to decompose.
        moment: One of its second moments.
        side: Of its inputs or its outputs.
        options: What to do with members that saw few tokens.

    Raises:
        UserError: See `decompositions`.
    """
    groups = members_of_slots(dense)
    least = options.min_tokens or moment.value.shape[-1]
    counts = [int(moment.count[group].sum()) for group in groups]
    check_tokens(bank, groups, counts, least, options.few_tokens)

    mean_energy = float(moment.value.diagonal(dim1=1, dim2=2).sum()) / int(moment.count.sum())
    mean = moment.pooled().to(dense.device)
    for slot, group in enumerate(groups):
        weight, count = dense.weight[slot], counts[slot]
        value = moment.value[group].sum(0).to(weight.device)
        fraction = float(count > 0)
        if options.few_tokens == "pooled":
            fraction = seen(count, least)
            if side == "input":
                value = pooled_inputs(value, count, least, mean)
            else:
                value = pooled_outputs(value, count, least, weight, mean_energy)
        yield value, fraction


def pooled_inputs(moment: Tensor, count: int, least: int, pooled: Tensor) -> Tensor:
    """Adds what a member lacks of `least` tokens as average tokens of all members.

    Args:
        moment: ``Σ x xᵀ [n, n]`` over the member's own tokens.
        count: How many those were.
        least: How many they should be.
        pooled: Mean ``x xᵀ [n, n]`` over the tokens of all members.

    Returns:
        The moment of ``max(count, least)`` tokens.
    """
    missing = max(least - count, 0)
    return moment + missing * pooled if missing else moment


def pooled_outputs(moment: Tensor, count: int, least: int, weight: Tensor, energy: float) -> Tensor:
    """The same on the output side: what is missing are white inputs through the member itself.

    What other members put out lies in other directions and says nothing about this one. A member
    without tokens is left with plain SVD.

    Args:
        moment: ``Σ (W x)(W x)ᵀ [n, n]`` over the member's own tokens.
        count: How many those were.
        least: How many they should be.
        weight: ``W [n, in]``.
        energy: Mean ``‖W x‖²`` over the tokens of all members: that of each token added.
    """
    missing = max(least - count, 0)
    if not missing:
        return moment
    white = weight.double() @ weight.double().T
    trace = float(white.trace())
    return moment + (missing * energy / trace * white if trace > 0 else 0.0)


def seen(count: int, least: int) -> float:
    """Returns the fraction of a member's moment that real tokens gave: it weighs its errors."""
    return count / max(count, least, 1)


def check_tokens(
    bank: Bank, groups: list[list[int]], counts: list[int], least: int, policy: str
) -> None:
    """Checks how many tokens gave a statistic.

    Args:
        bank: The bank.
        groups: For each slot the members that use it.
        counts: For each slot how many tokens reached those.
        least: How many are enough.
        policy: "error" to refuse fewer.

    Raises:
        UserError: A member saw fewer than are enough and the policy forbids it, or no token
            reached the bank at all.
    """
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
