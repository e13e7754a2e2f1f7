"""Plain SVD as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mctk import lowrank
from mctk.hookspecs import Method
from mctk.lowrank import LowRankOptions

if TYPE_CHECKING:
    from mctk.terms import Bank, BankShape, Term


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

    def sizes(self, shape: BankShape, options: LowRankOptions) -> tuple[list[int], list[int]]:
        """Ranks smaller than dense, then dense."""
        return lowrank.sizes(shape, options)

    def decompose(
        self, bank: Bank, statistics: Any, size: int | None, options: LowRankOptions
    ) -> list[Term]:
        """Replaces the bank's matrices by their best approximations of rank `size`."""
        from mctk_svd.math import decompositions

        dense = lowrank.matrices(bank)
        return lowrank.replace(bank, dense, decompositions(dense.weight), size, options)
