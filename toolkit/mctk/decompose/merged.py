"""What merges find and leave: experts' own matrices; bases that they share, and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mctk.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mctk.terms import Bank, Bias, Dense, Term


def part_of(name: str) -> str:
    """Returns gate, up or down for ``experts.gate`` ..."""
    return name.rsplit(".", 1)[-1]


def own_matrices(bank: Bank) -> Dense:
    """Returns the term with the members' own matrices, one whole matrix each.

    Raises:
        UserError: Another step has rewritten them.
    """
    from mctk.terms import Bias, Dense

    rest = [term for term in bank.terms if not isinstance(term, Bias)]
    own = list(range(bank.shape.members))
    if len(rest) == 1 and isinstance(rest[0], Dense):
        term = rest[0]
        if list(term.slots) == own and term.rows is None and term.cols is None:
            return term
    raise UserError(
        f"{bank.name} of layer {bank.layer} was rewritten by a step before: merge comes first"
    )


def base_and_residuals(
    bank: Bank,
    slots: Sequence[int],
    bases: Tensor,
    residual: Tensor,
    order: Tensor | None,
) -> list[Term]:
    """Returns the bank as bases and residuals, then its biases.

    Args:
        bank: The bank as the merge found it.
        slots: The base of each expert.
        bases: ``[n, out, in]``.
        residual: ``[E, out, in]``.
        order: The neurons' new order ``[E, I]`` where they moved.
    """
    from mctk.terms import Bias, Dense

    terms: list[Term] = [
        Dense(bank.shape, slots, bases),
        Dense(bank.shape, range(bank.shape.members), residual),
    ]
    stays = order is None or part_of(bank.name) == "down"
    for term in bank.terms:
        if isinstance(term, Bias):
            terms.append(term if stays or order is None else _reordered(term, order))
    return terms


def _reordered(term: Bias, order: Tensor) -> Bias:
    """Returns biases of gate or up with a slot for each expert that has one, in the new order."""
    import torch

    from mctk.terms import Bias

    vectors: list[Tensor] = []
    slots: list[int | None] = []
    for e in range(term.shape.members):
        vector = term.materialise(e)[1]
        slots.append(None if vector is None else len(vectors))
        if vector is not None:
            vectors.append(vector[order[e].to(vector.device)])
    return Bias(term.shape, slots, torch.stack(vectors))
