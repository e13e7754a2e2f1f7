"""A bank: same-shaped matrices, as the sum of their terms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from mctk.terms.dense import Bias, Dense
from mctk.terms.shape import BankShape
from mctk.terms.term import Term


@dataclass
class Bank:
    """Matrices that are compressed together, and the terms that stand for them.

    Attributes:
        name: The bank's name in its layer: ``experts.gate``, ``attention.q`` ...
        layer: Index of the layer.
        shape: Members and their size.
        terms: Summed in this order; every term has the bank's shape.
        groups: Into how many equal runs the router divides the members: it chooses groups first, so
            as many members of each have to stay, and at least two.
    """

    name: str
    layer: int
    shape: BankShape
    terms: list[Term] = field(default_factory=list)
    groups: int = 1

    def __post_init__(self) -> None:
        for term in self.terms:
            if term.shape != self.shape:
                raise ValueError(
                    f"{self.name} of layer {self.layer}: a {term.kind} term has {term.shape}, "
                    f"the bank {self.shape}"
                )

    def apply(self, x: Tensor, member: int) -> Tensor:
        """Returns the member's output ``[T, out]`` for ``x [T, in]``; zeros without any term."""
        total: Tensor | None = None
        for term in self.terms:
            if term.has(member):
                part = term.apply(x, member)
                total = part if total is None else total + part
        return x.new_zeros(x.shape[0], self.shape.out_features) if total is None else total

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """Returns the member as (weight ``[out, in]``, bias ``[out]``).

        Either is None where no term of the member has one.
        """
        weight: Tensor | None = None
        bias: Tensor | None = None
        for term in self.terms:
            term_weight, term_bias = term.materialise(member)
            weight = _add(weight, term_weight)
            bias = _add(bias, term_bias)
        return weight, bias

    def without_biases(self) -> Bank:
        """Returns the bank of the same weights, its constant outputs left out."""
        terms = [term for term in self.terms if not isinstance(term, Bias)]
        return replace(self, terms=terms)

    def matrices(self) -> Dense | None:
        """Returns the `Dense` term with most slots: the members' own matrices, or what is left.

        After a merge that are the residuals, and not the base that members share. None where the
        bank holds no full matrices.
        """
        dense = [term for term in self.terms if isinstance(term, Dense)]
        return max(dense, key=lambda term: term.weight.shape[0], default=None)

    def parameters(self) -> int:
        """Stored weight elements of all terms."""
        return sum(term.parameters() for term in self.terms)

    def nbytes(self) -> int:
        """Stored bytes of all terms, positions included."""
        return sum(term.nbytes() for term in self.terms)

    def macs(self, member: int) -> int:
        """Multiply-adds that one token costs in a member."""
        return sum(term.macs(member) for term in self.terms)


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part
