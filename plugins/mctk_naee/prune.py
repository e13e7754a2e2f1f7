"""Expert pruning by the reconstruction error of the layer's output (NAEE, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk.decompose import checked_experts, expert_layout, expert_sizes, present_groups
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field, model_validator

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import BankShape

    from mctk_naee.loss import SubsetLoss
    from mctk_naee.search import Choice

# Subsets that `search: exact` may try: an hour's work where a layer is small.
_MOST = 1_000_000


class NaeeOptions(MethodOptions):
    """Options of `naee`."""

    tokens: int = Field(
        default=16384,
        ge=1,
        description="on how many calibration tokens, the first ones, subsets are compared (the "
        "paper: all, 262144); each takes 4 E² bytes",
    )
    search: Literal["auto", "exact", "greedy", "beam"] = Field(
        default="auto",
        description="exact tries every subset; greedy removes one expert after the other; beam "
        "does so from several subsets at once; auto is exact up to `subsets`, else greedy",
    )
    subsets: int = Field(
        default=1000, ge=1, description="search: auto tries all subsets if they are no more"
    )
    width: int = Field(default=4, ge=2, description="how many subsets search: beam follows at once")

    @model_validator(mode="after")
    def _have_effect(self) -> NaeeOptions:
        for option, reader in (("subsets", "auto"), ("width", "beam")):
            if option in self.model_fields_set and self.search != reader:
                raise ValueError(f"{option} has no effect with search: {self.search}; leave it out")
        return self


class Naee(Method):
    """Removes the experts without which the layer's output changes least.

    NAEE (arXiv 2402.14800), section 3.2; its section 4.4 is this with `propagate: compressed`. The
    paper tries every subset; the other searches are ours.
    """

    stage = "prune"
    name = "naee"
    scope = "experts"
    summary = "Keeps the experts whose layer output is nearest to the original's (NAEE)."
    reference = "arXiv 2402.14800"
    Options = NaeeOptions
    takes_size = True
    same_size = True

    def needs(self, shape: BankShape, bank: str, options: NaeeOptions) -> list[Need]:
        """All experts' outputs on the same tokens, and the router."""
        from mctk.statistics import RoutedOutputs

        return [RoutedOutputs(options.tokens)] if bank == "experts.down" else []

    def sizes(self, banks: Layer, options: NaeeOptions) -> tuple[list[int], list[int]]:
        """How many experts stay, the same number of each of the router's groups; then all."""
        settings, costs = expert_sizes(banks)
        for count in settings[:-1]:
            _checked(banks, count, options)
        return settings, costs

    def layout(self, banks: Layer, size: int | None, options: NaeeOptions) -> Terms:
        """The first experts of every group; which ones stay, data will tell."""
        from mctk.terms import DENSE

        if size != DENSE:
            _checked(banks, size, options)
        return expert_layout(banks, size)

    def curve(self, banks: Layer, statistics: Any, options: NaeeOptions) -> list[float]:
        """The loss at every size; of sizes that leave a token too few experts, all there is."""
        from mctk.terms import DENSE

        loss = _loss(banks, statistics, options)
        settings, _ = self.sizes(banks, options)
        errors = []
        for size in settings:
            if size == DENSE:
                errors.append(loss.whole)
            elif size < loss.top:
                errors.append(max(loss.energy, loss.whole))
            else:
                errors.append(_search(banks, loss, size, options)[1].loss)
        return errors

    def prune(self, layer: Layer, statistics: Any, size: int | None, options: NaeeOptions) -> Terms:
        """Removes all but `size` experts."""
        from mctk.terms import DENSE, drop_members

        if size == DENSE:
            return {name: list(bank.terms) for name, bank in layer.items()}
        count = _checked(layer, size, options)
        loss = _loss(layer, statistics, options)
        how, found = _search(layer, loss, count, options)
        share = (
            f", {found.loss / loss.energy:.2%} of the energy of the experts' output"
            if loss.energy
            else ""
        )
        note(
            f"keeps experts {', '.join(map(str, found.kept))}: {how} search, {found.tried} subsets "
            f"tried, loss {found.loss:.6g}{share}"
        )
        gone = set(range(next(iter(layer.values())).shape.members)) - set(found.kept)
        return {name: drop_members(bank, gone) for name, bank in layer.items()}


def _checked(banks: Layer, size: int | None, options: NaeeOptions) -> int:
    """Returns the size.

    Raises:
        UserError: So many experts cannot stay, or there are too many ways to choose them.
    """
    from mctk_naee.search import count_subsets

    count = checked_experts(banks, size)
    subsets = count_subsets(present_groups(banks), count)
    if options.search == "exact" and subsets > _MOST:
        raise UserError(
            f"search: exact in layer {next(iter(banks.values())).layer} would try {subsets:.3g} "
            f"subsets of {count} experts; write greedy or beam"
        )
    return count


def _loss(banks: Layer, statistics: Any, options: NaeeOptions) -> SubsetLoss:
    from mctk.statistics import RoutedOutputs

    from mctk_naee.loss import SubsetLoss

    present = [e for group in present_groups(banks) for e in group]
    return SubsetLoss(statistics[RoutedOutputs(options.tokens)], present)


def _search(banks: Layer, loss: SubsetLoss, size: int, options: NaeeOptions) -> tuple[str, Choice]:
    """Returns which search it was, and what it found."""
    from mctk_naee.search import beam, count_subsets, exact

    groups = present_groups(banks)
    how: str = options.search
    if how == "auto":
        how = "exact" if count_subsets(groups, size) <= options.subsets else "greedy"
    if how == "exact":
        return how, exact(loss, groups, size)
    weights = dict(enumerate(loss.contributions().tolist()))
    return how, beam(loss, groups, size, options.width if how == "beam" else 1, weights)
