"""Plain SVD, and the two that weigh a matrix's channels before it, FWSVD and ASVD, as methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.decompose import LowRankOptions
from mctk.errors import UserError
from mctk.hookspecs import Method
from pydantic import Field

if TYPE_CHECKING:
    from mctk.decompose import Truncatable
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, Dense, Term


class _Svd(Method):
    """What the three share: sizes, layout and truncation; `_parts` is the difference."""

    stage = "decompose"
    takes_size = True
    # They know what they remove from the (weighted) weights, not what that does to any output.
    units = "score"

    def _side(self, options: Any) -> Literal["", "input", "output"]:
        """The side of a bank whose channels are weighed."""
        return ""

    @abstractmethod
    def _parts(
        self, bank: Bank, dense: Dense, statistics: Any, options: Any
    ) -> Iterator[Truncatable]:
        """A decomposition for each slot of the term."""

    def sizes(self, banks: Layer, options: LowRankOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense."""
        return decompose.sizes(banks, options)

    def layout(self, banks: Layer, size: int | None, options: LowRankOptions) -> Terms:
        """Two factors for every member."""
        self._check_order(decompose.only(banks), options)
        return decompose.layout(banks, size, options)

    def curve(self, banks: Layer, statistics: Any, options: LowRankOptions) -> list[float]:
        """What each rank drops of the weighted matrices: Σ σ², over the bank's matrices."""
        bank = decompose.only(banks)
        settings, _ = self.sizes(banks, options)
        total = [0.0] * len(settings)
        parts = self._parts(bank, decompose.matrices(bank), statistics, options)
        for part in decompose.name_errors(bank, parts):
            for k, error in enumerate(decompose.tail_errors(part.spectrum, settings)):
                total[k] += error
        return total

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: LowRankOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by their best approximations of rank `size`."""
        self._check_order(bank, options)
        dense = decompose.matrices(bank)
        parts = self._parts(bank, dense, statistics, options)
        return decompose.replace(bank, dense, parts, size, options)

    def _check_order(self, bank: Bank, options: LowRankOptions) -> None:
        """Channels are weighed by what the original's did: an expert's must be where they were.

        Raises:
            UserError: A merge came before, which may have reordered an expert's neurons.
        """
        neurons = "input" if bank.name == "experts.down" else "output"
        if not bank.name.startswith("experts.") or neurons != self._side(options):
            return
        dense = decompose.matrices(bank)
        shared = any(len(group) > 1 for group in decompose.members_of_slots(dense))
        if shared or any(term is not dense for term in bank.without_biases().terms):
            raise UserError(
                f"{self.stage}/{self.name}: {bank.name} of layer {bank.layer} was merged before, "
                "and its neurons may have changed places: decompose it with svd_llm"
            )


class Svd(_Svd):
    """Truncated SVD of every matrix, without any data: Eckart and Young (1936).

    The baseline "SVD" of arXiv 2403.07378, section 4.1 and Table 1.
    """

    name = "svd"
    summary = "Truncated SVD of every matrix by itself; needs no data."
    reference = "Eckart and Young, Psychometrika 1 (1936)"
    Options = LowRankOptions

    def _parts(
        self, bank: Bank, dense: Dense, statistics: Any, options: LowRankOptions
    ) -> Iterator[Truncatable]:
        from mctk_svd.math import decompositions

        yield from decompositions(dense.weight)


class FwsvdOptions(LowRankOptions):
    """Options of `fwsvd`."""

    side: Literal["input", "output"] = Field(
        default="input",
        description="what Fisher information is summed over: all weights that read an input, as in "
        "the paper, or all that give an output",
    )
    labels: Literal["data", "model"] = Field(
        default="data",
        description="data: gradients of the calibration text's own next tokens; model: of tokens "
        "drawn from the model's predictions",
    )


class Fwsvd(_Svd):
    """SVD after weighing every channel by the square root of its Fisher information.

    FWSVD, Hsu et al., ICLR 2022 (arXiv 2207.00112), section 4, eq. 5 and 6. Its layer is ``x W``
    with W [in, out] (section 2.1, eq. 2): the rows that it weighs are our columns.
    """

    name = "fwsvd"
    summary = "SVD with channels weighted by their Fisher information; takes a backward sweep."
    reference = "arXiv 2207.00112"
    Options = FwsvdOptions

    def needs(self, shape: BankShape, bank: str, options: FwsvdOptions) -> list[Need]:
        """The squared gradients, summed over each channel's weights (section 2.2)."""
        from mctk.statistics import ChannelFisher

        return [ChannelFisher(bank, options.side, options.labels)]

    def _side(self, options: FwsvdOptions) -> Literal["", "input", "output"]:
        return options.side

    def _parts(
        self, bank: Bank, dense: Dense, statistics: Any, options: FwsvdOptions
    ) -> Iterator[Truncatable]:
        from mctk.statistics import ChannelFisher

        from mctk_svd.math import ScaledSVD, fisher_weights

        fisher = statistics[ChannelFisher(bank.name, options.side, options.labels)]
        side = "columns" if options.side == "input" else "rows"
        for slot, group in enumerate(decompose.members_of_slots(dense)):
            yield ScaledSVD(dense.weight[slot], **{side: fisher_weights(fisher[group].sum(0))})


class AsvdOptions(LowRankOptions):
    """Options of `asvd`."""

    alpha: float = Field(
        default=0.5,
        ge=0.0,
        le=2.0,
        description="power of a channel's mean magnitude; 0 is plain SVD",
    )
    few_tokens: Literal["pooled", "error", "keep"] = Field(
        default="pooled",
        description="an expert that saw fewer than min_tokens: pooled adds average tokens of its "
        "layer, error stops, keep uses what there is (plain SVD for an expert without any token)",
    )
    min_tokens: int = Field(default=64, ge=1, description="how many tokens are enough")


class Asvd(_Svd):
    """SVD after scaling every input column by its channel's mean magnitude to the power alpha.

    ASVD, Yuan et al. (arXiv 2312.05821v4), eq. 3 to 8, with the "abs mean" transform of eq. 8; its
    search for a rank of each matrix (section 3.4) is not here.
    """

    name = "asvd"
    summary = "SVD with columns scaled by the mean magnitude of their activations."
    reference = "arXiv 2312.05821"
    Options = AsvdOptions

    def needs(self, shape: BankShape, bank: str, options: AsvdOptions) -> list[Need]:
        """The sums of the magnitudes of what enters every member."""
        from mctk.statistics import ChannelMagnitude

        return [ChannelMagnitude(bank)]

    def _side(self, options: AsvdOptions) -> Literal["", "input", "output"]:
        return "input"

    def _parts(
        self, bank: Bank, dense: Dense, statistics: Any, options: AsvdOptions
    ) -> Iterator[Truncatable]:
        from mctk.statistics import ChannelMagnitude

        from mctk_svd.math import ScaledSVD, magnitude_weights, pooled_mean

        magnitude = statistics[ChannelMagnitude(bank.name)]
        groups = decompose.members_of_slots(dense)
        counts = [int(magnitude.count[group].sum()) for group in groups]
        decompose.check_tokens(bank, groups, counts, options.min_tokens, options.few_tokens)
        least = options.min_tokens if options.few_tokens == "pooled" else 0
        layer = magnitude.value.double().sum(0) / int(magnitude.count.sum())
        for slot, group in enumerate(groups):
            total = magnitude.value[group].double().sum(0)
            mean = pooled_mean(total, counts[slot], least, layer)
            yield ScaledSVD(dense.weight[slot], columns=magnitude_weights(mean, options.alpha))
