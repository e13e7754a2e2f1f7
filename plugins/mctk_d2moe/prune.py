"""Semi-dynamic structured pruning of the bases: some channels for good, some at run time.

Gate's and up's base lose output rows and down's base the same input columns; the channels live on
in the experts' own parts. The static half is chosen on calibration data and leaves the file. The
dynamic half is stored and skipped, tokens decide which (`mctk.terms.DynamicDense`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mctk.decompose import part_of
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field, model_validator

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import ChannelEnergy, Need
    from mctk.terms import Bank, BankShape, Dense, Term
    from torch import Tensor

PARTS = ("gate", "up", "down")


class SemiDynamicOptions(MethodOptions):
    """Options of `semi_dynamic`."""

    static: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="the share of the base's channels that leaves the file, where the step states "
        "no size (a size is the number that stay)",
    )
    dynamic: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="the share of the base's channels, of all there were, that each forward skips: "
        "stored, not computed, and the choice depends on the tokens of a batch",
    )
    channel_multiple: int = Field(
        default=8,
        ge=1,
        description="numbers of channels are rounded to multiples of it (fast kernels want 8 in "
        "bfloat16)",
    )

    @model_validator(mode="after")
    def _leaves_some(self) -> SemiDynamicOptions:
        if self.static + self.dynamic >= 1:
            raise ValueError("static and dynamic together must be below 1")
        if "static" in self.model_fields_set and self.static + self.dynamic == 0:
            raise ValueError("static and dynamic are both 0: nothing would be pruned")
        return self


class SemiDynamic(Method):
    """Prunes the channels of a shared base by what they add to the layer's output."""

    stage = "prune"
    name = "semi_dynamic"
    scope = "layer"
    summary = "Prunes intermediate channels of a merged base, for good and, if asked, at run time."
    reference = "arXiv 2502.17298, eq. 9"
    Options = SemiDynamicOptions
    takes_size = "optional"

    def needs(self, shape: BankShape, bank: str, options: SemiDynamicOptions) -> list[Need]:
        """What enters down, by channel: weighted by routing for one base, per expert for several.

        In the neurons' present order: a merge may have brought them into a common one.
        """
        from mctk.statistics import ExpertFrequency, RouterWeight

        if bank != "experts.down":
            return []
        return [_energy(weighted=True), _energy(), ExpertFrequency(), RouterWeight()]

    def sizes(self, banks: Layer, options: SemiDynamicOptions) -> tuple[list[int], list[int]]:
        """Numbers of channels that stay; each costs a row of gate and up and a column of down."""
        from mctk.terms import DENSE

        bases = _bases(banks)
        channels = _channels(bases)
        counts = [*range(options.channel_multiple, channels, options.channel_multiple), DENSE]
        costs = []
        for count in counts:
            kept = channels if count == DENSE else count
            cost = sum(base.weight.numel() // channels * kept for base in bases.values())
            if _dropped(kept, channels, options):
                cost += bases["down"].weight.shape[0] * kept  # the energies that choose
            costs.append(cost)
        return counts, costs

    def layout(self, banks: Layer, size: int | None, options: SemiDynamicOptions) -> Terms:
        """Smaller bases; which channels they hold needs data."""
        import torch

        bases = _bases(banks)
        channels = _channels(bases)
        stored = bases["down"].weight.shape[0]
        count = _kept(channels, size, options)
        if size is None and count == channels and not _dropped(count, channels, options):
            raise UserError(
                f"static {options.static:g} of {channels} channels rounds to none in multiples of "
                f"{options.channel_multiple}: raise it, or lower channel_multiple"
            )
        energy = torch.empty(stored, channels, device="meta")
        chosen = torch.empty(stored, count, dtype=torch.long, device="meta")
        return _pruned(banks, bases, chosen, energy, options)

    def curve(self, banks: Layer, statistics: Any, options: SemiDynamicOptions) -> list[float]:
        """Squared error of the layer's output over all tokens: the dropped channels' scores.

        Of the static half: what is only skipped is not in it.
        """
        from mctk.terms import DENSE

        bases = _bases(banks)
        settings, _ = self.sizes(banks, options)
        found = _scores(bases["down"], statistics)
        # From the smallest on, so that small sums keep their digits; summed over the bases.
        tails = [0.0, *found.sort(dim=1).values.cumsum(1).sum(0).tolist()]
        return [0.0 if count == DENSE else tails[found.shape[1] - count] for count in settings]

    def prune(
        self, layer: Layer, statistics: Any, size: int | None, options: SemiDynamicOptions
    ) -> Terms:
        """Cuts the bases down to `size` channels, or to what `static` leaves."""
        from mctk_d2moe.channels import keep

        bases = _bases(layer)
        found = _scores(bases["down"], statistics)
        count = _kept(found.shape[1], size, options)
        return _pruned(layer, bases, keep(found, count), found, options)


def _energy(weighted: bool = False) -> ChannelEnergy:
    from mctk.statistics import ChannelEnergy

    return ChannelEnergy("experts.down", weighted=weighted, of="current")


def _bases(layer: Layer) -> dict[str, Dense]:
    """Returns the base of gate (where there is one), up and down.

    Raises:
        UserError: A bank has none, is not targeted, or was pruned before.
    """
    from mctk.terms import Dense

    names = {part_of(name): name for name in layer}
    first = next(iter(layer.values()))
    place = f"layer {first.layer}"
    if not {"up", "down"} <= set(names) <= set(PARTS):
        raise UserError(
            f"prune/semi_dynamic in {place} cuts gate, up and down of the experts together, not "
            f"{', '.join(layer)}: target experts.*"
        )
    found: dict[str, Dense] = {}
    for part in (part for part in PARTS if part in names):
        bank = layer[names[part]]
        shared = [
            term
            for term in bank.terms
            if isinstance(term, Dense) and term.weight.shape[0] < bank.shape.members
        ]
        if not shared:
            raise UserError(
                f"{bank.name} of {place} has no base that experts share: prune/semi_dynamic needs "
                "a merge before it"
            )
        found[part] = shared[0]  # the merge's; shared factors of full rank may stand after it
    for part, base in found.items():
        if base.rows is not None or base.cols is not None or base.kind != Dense.kind:
            raise UserError(f"the base of {names[part]} in {place} was pruned before")
        if base.slots != found["down"].slots:
            raise UserError(f"{names[part]} and {names['down']} of {place} share bases differently")
    return found


def _channels(bases: Mapping[str, Dense]) -> int:
    return bases["down"].weight.shape[2]


def _kept(channels: int, size: int | None, options: SemiDynamicOptions) -> int:
    """Returns how many channels stay in the file.

    Raises:
        UserError: No such number is possible.
    """
    from mctk.terms import DENSE

    from mctk_d2moe.channels import remaining

    if size == DENSE:
        return channels
    if size is None:
        return remaining(channels, options.static, options.channel_multiple)
    if not 1 <= size <= channels:
        raise UserError(f"a base of {channels} channels cannot keep {size}")
    return size


def _dropped(kept: int, channels: int, options: SemiDynamicOptions) -> int:
    """Returns how many of the kept channels a forward skips; one multiple is always computed."""
    from mctk_d2moe.channels import remaining

    share = min(options.dynamic * channels / kept, 1.0)
    return kept - remaining(kept, share, options.channel_multiple)


def _scores(down: Dense, statistics: Any) -> Tensor:
    """Returns the channels' scores ``[S, I]``."""
    from mctk.decompose import members_of_slots
    from mctk.statistics import ExpertFrequency, RouterWeight

    from mctk_d2moe.channels import group_energy, scores

    if down.weight.shape[0] == 1:
        return scores(down.weight, statistics[_energy(weighted=True)])
    energy = group_energy(
        statistics[_energy()],
        statistics[ExpertFrequency()],
        statistics[RouterWeight()],
        members_of_slots(down),
    )
    return scores(down.weight, energy)


def _pruned(
    layer: Layer,
    bases: Mapping[str, Dense],
    chosen: Tensor,
    found: Tensor,
    options: SemiDynamicOptions,
) -> dict[str, list[Term]]:
    """Returns the banks with bases cut down to the chosen channels.

    Args:
        layer: The banks.
        bases: Their bases by part.
        chosen: Channels that stay, ``[S, C]``, ascending.
        found: The channels' scores ``[S, I]``, what the run time's choice begins with.
        options: How many of them a forward skips.
    """
    channels = _channels(bases)
    drop = _dropped(chosen.shape[1], channels, options)
    result: dict[str, list[Term]] = {}
    for name, bank in layer.items():
        part = part_of(name)
        base = bases[part]
        if chosen.shape[1] == channels and not drop:
            result[name] = list(bank.terms)
            continue
        term = _cut(bank, base, part, chosen, found, drop)
        result[name] = [term if other is base else other for other in bank.terms]
    return result


def _cut(bank: Bank, base: Dense, part: str, chosen: Tensor, found: Tensor, drop: int) -> Dense:
    """Returns one base with the chosen channels, skipped ones marked if there are any."""
    from mctk.terms import Dense, DynamicDense

    axis = "cols" if part == "down" else "rows"
    weight = base.weight
    index: dict[str, Tensor] = {}
    where = chosen.to(weight.device)
    if chosen.shape[1] < found.shape[1]:
        place = where[:, None, :] if axis == "cols" else where[:, :, None]
        sizes = (-1, weight.shape[1], -1) if axis == "cols" else (-1, -1, weight.shape[2])
        weight = weight.gather(2 if axis == "cols" else 1, place.expand(*sizes))
        index[axis] = (where[0] if where.shape[0] == 1 else where).int()
    if not drop:
        return Dense(bank.shape, base.slots, weight, **index)
    energy = None
    if axis == "cols":
        # Only proportions matter: at most 1, whatever dtype they will be stored in.
        energy = found.to(weight.device).gather(1, where)
        energy = (energy / energy.amax(1, keepdim=True).clamp(min=1e-300)).to(weight.dtype)
    return DynamicDense(
        bank.shape, base.slots, weight, **index, drop=drop, axis=axis, energy=energy
    )
