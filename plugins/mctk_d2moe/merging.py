"""What the merges share: clusters, alignment, a base for each, and what is left of the experts.

A merge replaces a bank's matrices ``W_e`` by two terms that add up to them exactly: a base, one
slot for each cluster of experts, and the residual ``W_e − W_b``, one for each expert.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mctk.decompose import base_and_residuals, moment_side, part_of
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field, model_validator

from mctk_d2moe.experts import several_matrices, weights

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, Term
    from torch import Tensor


class MergeOptions(MethodOptions):
    """Options of every merge."""

    bases: int | Literal["auto"] = Field(
        default=1,
        description="bases of a layer, each for a cluster of similar experts; auto takes the power "
        "of two with the least expected error at the layer's even share of the budget",
    )
    similarity: Literal["weight", "output"] = Field(
        default="weight",
        description="what makes experts similar where there are several bases: weight, their "
        "matrices; output, what gate and up put out on the layer's tokens",
    )
    align: bool = Field(
        default=False,
        description="first bring each expert's intermediate neurons into the order of the most "
        "frequent expert of its cluster; needs gate, up and down among the targets",
    )
    storage: Literal["plain", "pivoted"] = Field(
        default="plain",
        description="how the decompose step that follows will store the residuals' factors; only "
        "bases: auto asks",
    )
    min_rank: int = Field(
        default=8,
        ge=1,
        description="bases: auto takes no second base that leaves the residuals less rank than "
        "this (automatic ranks begin with the decompose step's rank_multiple)",
    )

    @model_validator(mode="after")
    def _have_effect(self) -> MergeOptions:
        asked = {"similarity": self.bases != 1}
        asked |= dict.fromkeys(("storage", "min_rank"), self.bases == "auto")
        for option, read in asked.items():
            if option in self.model_fields_set and not read:
                raise ValueError(f"{option} has no effect with bases: {self.bases}; leave it out")
        return self


@dataclass(frozen=True)
class Plan:
    """Which experts share a base, and in which order their neurons stand.

    Attributes:
        groups: The clusters' members; a cluster's number is its base's slot.
        anchors: For each cluster its most frequent expert (the first without frequencies).
        order: ``[E, I]``, see `mctk.linalg.orders`; None where neurons stay.
    """

    groups: list[list[int]]
    anchors: list[int]
    order: Tensor | None = None

    @property
    def slots(self) -> list[int]:
        """The base of each expert."""
        found = {e: slot for slot, group in enumerate(self.groups) for e in group}
        return [found[e] for e in range(len(found))]


class Merge(Method):
    """Base of the merges; a subclass says what a cluster has in common."""

    stage = "merge"
    scope = "layer"
    reference = "arXiv 2502.17298, table 5"
    Options = MergeOptions
    uses_frequency = False  # whether `base` asks how often each expert was chosen

    def prepare(
        self, bank: Bank, statistics: Any, options: Any, order: Tensor | None
    ) -> dict[str, Any]:
        """Returns what `base` gets beside the matrices, in the neurons' new order."""
        return {}

    @abstractmethod
    def base(self, weight: Tensor, members: Sequence[int], anchor: int, **extra: Any) -> Tensor:
        """Returns the base ``[out, in]`` of a cluster, float32.

        Args:
            weight: All experts' matrices ``[E, out, in]``, in their new order.
            members: The cluster.
            anchor: Its most frequent expert.
            extra: What `prepare` returned.
        """

    def needs(self, shape: BankShape, bank: str, options: MergeOptions) -> list[Need]:
        """Frequencies, and moments of inputs where experts are compared by what they put out."""
        from mctk.statistics import ExpertFrequency, SecondMoment

        found: list[Need] = []
        if self.uses_frequency or options.align:
            found.append(ExpertFrequency())
        if part_of(bank) != "down" and options.bases != 1 and options.similarity == "output":
            found.append(SecondMoment(bank, "input", pooled=True))
        if options.bases == "auto" and _is_judged(bank, shape):
            found.append(SecondMoment(bank, "input"))
        return found

    def layout(self, banks: Layer, size: int | None, options: MergeOptions) -> Terms | None:
        """A base for each cluster, a residual for each expert; who shares one, data will tell."""
        import torch

        experts = _check(banks, options)
        if options.bases == "auto":
            _check_size(banks, size)
            return None
        slots = [e * options.bases // experts for e in range(experts)]
        result: dict[str, list[Term]] = {}
        for name, bank in banks.items():
            out, into = bank.shape.out_features, bank.shape.in_features
            neurons = into if part_of(name) == "down" else out
            result[name] = base_and_residuals(
                bank,
                slots,
                torch.empty(options.bases, out, into, device="meta"),
                torch.empty(experts, out, into, device="meta"),
                torch.empty(experts, neurons, dtype=torch.long, device="meta")
                if options.align
                else None,
            )
        return result

    def merge(
        self, layer: Layer, statistics: Any, size: int | None, options: MergeOptions
    ) -> Terms:
        """Splits every bank into bases and residuals."""
        import torch
        from mctk.linalg import reorder

        _check(layer, options)
        plan = self._plan(layer, statistics, size, options)
        result: dict[str, list[Term]] = {}
        for name, bank in layer.items():
            part = part_of(name)
            weight = reorder(several_matrices(bank).weight, part, plan.order)
            bases = self._bases(bank, weight, statistics, plan, options)
            residual = torch.empty_like(weight, dtype=torch.float32)
            for e, slot in enumerate(plan.slots):
                torch.sub(weight[e].float(), bases[slot], out=residual[e])
            result[name] = base_and_residuals(bank, plan.slots, bases, residual, plan.order)
        return result

    def _bases(
        self, bank: Bank, weight: Tensor, statistics: Any, plan: Plan, options: MergeOptions
    ) -> Tensor:
        """Returns ``[n, out, in]`` for a bank's matrices in their new order."""
        import torch

        extra = self.prepare(bank, statistics, options, plan.order)
        groups = zip(plan.groups, plan.anchors, strict=True)
        return torch.stack([self.base(weight, group, anchor, **extra) for group, anchor in groups])

    def _plan(self, layer: Layer, statistics: Any, size: int | None, options: MergeOptions) -> Plan:
        """Clusters the experts, into as many clusters as asked for or as are best."""
        distances = None
        if options.bases != 1:
            distances = self._distances(layer, statistics, options)
        if options.bases != "auto":
            return self._arrange(layer, statistics, distances, options.bases, options)
        return self._best(layer, statistics, distances, size, options)

    def _arrange(
        self,
        layer: Layer,
        statistics: Any,
        distances: Tensor | None,
        count: int,
        options: MergeOptions,
    ) -> Plan:
        """Returns the clusters at a given number of bases, and the order of neurons in each."""
        from mctk.linalg import orders

        from mctk_d2moe.clusters import clusters

        experts = next(iter(layer.values())).shape.members
        groups = [list(range(experts))] if distances is None else clusters(distances, count)
        frequency = self._frequency(statistics, experts, options)
        anchors = [max(group, key=lambda e: (frequency[e], -e)) for group in groups]
        order = orders(weights(layer), groups, anchors) if options.align else None
        return Plan(groups, anchors, order)

    def _distances(self, layer: Layer, statistics: Any, options: MergeOptions) -> Tensor:
        """Returns squared distances ``[E, E]``, summed over banks, each relative to its energy.

        With `align`, after all experts were brought to the order of the layer's most frequent one.
        """
        from mctk.linalg import reorder
        from mctk.statistics import SecondMoment

        from mctk_d2moe.clusters import differences

        one = self._arrange(layer, statistics, None, 1, options)
        parts = []
        for name, bank in layer.items():
            weight = reorder(several_matrices(bank).weight, part_of(name), one.order)
            if options.similarity == "weight":
                parts.append(differences(weight))
            elif part_of(name) != "down":
                moment = statistics[SecondMoment(name, "input", pooled=True)]
                parts.append(differences(weight, moment.value[0]))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _best(
        self,
        layer: Layer,
        statistics: Any,
        distances: Tensor | None,
        size: int | None,
        options: MergeOptions,
    ) -> Plan:
        """Returns the plan of the number of bases whose residuals lose least at the layer's size.

        What the bases leave of the size, the banks' residuals share by their own sizes. One number
        of bases after the other, so that one set of bases is in memory.
        """
        from mctk_d2moe.auto import candidates

        first = next(iter(layer.values()))
        size = _check_size(layer, size)
        best: tuple[float, Plan] | None = None
        for count in candidates(first.shape.members):
            ranks = _ranks(layer, count, size, options)
            if best is not None and min(ranks.values()) < options.min_rank:
                break
            plan = self._arrange(layer, statistics, distances, count, options)
            error = self._error(layer, statistics, plan, ranks, options)
            if best is None or error < best[0]:
                best = (error, plan)
        assert best is not None
        return best[1]

    def _error(
        self,
        layer: Layer,
        statistics: Any,
        plan: Plan,
        ranks: Mapping[str, int],
        options: MergeOptions,
    ) -> float:
        """Returns the expected error of residuals cut at the banks' ranks, as far as it is seen."""
        from mctk.linalg import reorder
        from mctk.statistics import SecondMoment

        from mctk_d2moe.align import reorder_moment
        from mctk_d2moe.auto import residual_error

        total = 0.0
        for name, bank in layer.items():
            if not _is_judged(name, bank.shape):
                continue
            part = part_of(name)
            weight = reorder(several_matrices(bank).weight, part, plan.order)
            moment = statistics[SecondMoment(name, "input")].value
            if part == "down":
                moment = reorder_moment(moment, plan.order)
            bases = self._bases(bank, weight, statistics, plan, options)
            total += residual_error(weight, bases, plan.slots, moment, ranks[name])
        return total

    def _frequency(self, statistics: Any, experts: int, options: MergeOptions) -> list[int]:
        from mctk.statistics import ExpertFrequency

        if self.uses_frequency or options.align:
            return statistics[ExpertFrequency()].tolist()
        return [0] * experts


def seed_of(bank: Bank, seed: int) -> int:
    """Returns a seed of its own for each bank of each layer."""
    return zlib.crc32(f"{seed}/{bank.layer}/{bank.name}".encode())


def _ranks(layer: Layer, count: int, size: int, options: MergeOptions) -> dict[str, int]:
    """Returns the rank for each bank's residuals that `count` bases leave of the layer's size."""
    from mctk_d2moe.auto import rank_within

    shapes = {name: bank.shape for name, bank in layer.items()}
    whole = sum(shape.parameters for shape in shapes.values())
    rest = max(size - count * sum(s.parameters // s.members for s in shapes.values()), 0)
    return {
        name: rank_within(
            shape.members,
            shape.out_features,
            shape.in_features,
            rest * shape.parameters // whole,
            options.storage,
        )
        for name, shape in shapes.items()
    }


def _check_size(layer: Layer, size: int | None) -> int:
    """Returns the size; without one, bases and ranks cannot be weighed.

    Raises:
        UserError: There is none.
    """
    if size is None:
        first = next(iter(layer.values()))
        raise UserError(
            f"bases: auto in layer {first.layer} weighs bases against ranks within a budget: "
            "give the recipe one, or state a number of bases"
        )
    return size


def _is_judged(name: str, shape: BankShape) -> bool:
    """Whether `bases: auto` looks at a bank's error: not at down's where its inputs are wide."""
    return part_of(name) != "down" or moment_side(shape) == "input"


def _check(layer: Layer, options: MergeOptions) -> int:
    """Returns the number of experts after checking that the options go with the targets.

    Raises:
        UserError: They do not; the message names the option or the targets.
    """
    first = next(iter(layer.values()))
    place, experts = f"layer {first.layer}", first.shape.members
    parts = {part_of(name) for name in layer}
    for bank in layer.values():
        several_matrices(bank)
        if bank.shape.members != experts:
            raise UserError(
                f"{bank.name} of {place} has {bank.shape.members} members, {first.name} {experts}: "
                "merge the banks of one group of experts at a time"
            )
    if options.align and not parts >= {"gate", "up", "down"}:
        missing = ", ".join(sorted({"gate", "up", "down"} - parts))
        raise UserError(
            f"align in {place} moves an expert's gate, up and down together, but {missing} is not "
            "among the targets: target experts.*, or set align to false"
        )
    if options.bases == 1:
        return experts
    if options.similarity == "output" and parts <= {"down"}:
        raise UserError(
            f"similarity: output in {place} compares what gate and up put out, and neither is "
            "targeted: target experts.*, or set similarity to weight"
        )
    if options.bases == "auto":
        judged = any(_is_judged(name, bank.shape) for name, bank in layer.items())
        if not judged:
            raise UserError(
                f"bases: auto in {place} judges by gate and up, and neither is targeted: target "
                "experts.*, or state a number of bases"
            )
    elif not 1 <= options.bases < experts:
        raise UserError(
            f"bases: {options.bases} in {place}, whose {experts} experts allow 1 to {experts - 1}"
        )
    return experts
