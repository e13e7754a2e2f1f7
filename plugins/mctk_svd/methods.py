"""Plain SVD as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mctk import decompose
from mctk.decompose import LowRankOptions
from mctk.hookspecs import Method

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.terms import Bank, Term


class Svd(Method):
    """Truncated SVD of every matrix, without any data."""

    stage = "decompose"
    name = "svd"
    summary = "Truncated SVD of every matrix by itself; needs no data."
    reference = "Eckart and Young, Psychometrika 1 (1936)"
    Options = LowRankOptions
    takes_size = True
    # It knows what it removes from the weights, not what that does to any output.
    units = "score"

    def sizes(self, banks: Layer, options: LowRankOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense."""
        return decompose.sizes(banks, options)

    def layout(self, banks: Layer, size: int | None, options: LowRankOptions) -> Terms:
        """Two factors for every member."""
        return decompose.layout(banks, size, options)

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: LowRankOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by their best approximations of rank `size`."""
        from mctk_svd.math import decompositions

        dense = decompose.matrices(bank)
        return decompose.replace(bank, dense, decompositions(dense.weight), size, options)
