"""The experts' banks as a merge finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mctk.decompose import own_matrices, part_of
from mctk.errors import UserError

if TYPE_CHECKING:
    from mctk.hookspecs import Layer
    from mctk.terms import Bank, Dense
    from torch import Tensor


def several_matrices(bank: Bank) -> Dense:
    """Returns the term with the experts' own matrices.

    Raises:
        UserError: Another step has rewritten them, or there is only one.
    """
    term = own_matrices(bank)
    if bank.shape.members < 2:
        raise UserError(f"{bank.name} of layer {bank.layer} has one member: merge needs two")
    return term


def weights(layer: Layer) -> dict[str, Tensor]:
    """Returns the experts' matrices by part, each ``[E, out, in]``."""
    return {part_of(name): several_matrices(bank).weight for name, bank in layer.items()}
