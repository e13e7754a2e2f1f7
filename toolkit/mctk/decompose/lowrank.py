"""What methods that decompose a bank into low-rank factors share: options, sizes, the new terms.

Such a method computes one truncatable decomposition per stored matrix; the rest is here. Torch is
imported inside the functions: a recipe is read without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from mctk.errors import UserError
from mctk.hookspecs import MethodOptions

if TYPE_CHECKING:
    from torch import Tensor

    from mctk.terms import Bank, BankShape, Dense, Term

log = logging.getLogger(__name__)
T = TypeVar("T")


class Truncatable(Protocol):
    """The decomposition of a matrix ``[out, in]`` from which factors of any rank are taken.

    `mctk.linalg.MetricSVD` is one.
    """

    @property
    def spectrum(self) -> Tensor:
        """What keeping each direction adds, descending: what dropping it costs."""

    def factors(self, rank: int, balance: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ``U [out, rank]`` and ``V [rank, in]``."""


class LowRankOptions(MethodOptions):
    """Options of every low-rank method."""

    storage: Literal["plain", "pivoted"] = Field(
        default="plain",
        description="plain: both factors in full, as in the papers; pivoted: the same product with "
        "rank² fewer numbers, so a higher rank at the same size",
    )
    balance: bool = Field(
        default=False,
        description="give both factors the square root of the singular values, so that rounding "
        "hurts them alike; plain storage only",
    )
    rank_multiple: int = Field(
        default=8,
        ge=1,
        description="automatic ranks are multiples of it (fast kernels want 8 in bfloat16)",
    )

    @model_validator(mode="after")
    def _balance_needs_plain(self) -> LowRankOptions:
        if self.balance and self.storage == "pivoted":
            raise ValueError("balance has no effect in pivoted storage: set storage to plain")
        return self


def only(banks: Mapping[str, Bank]) -> Bank:
    """Returns the one bank that a method of scope "bank" is given."""
    (bank,) = banks.values()
    return bank


def sizes(
    banks: Mapping[str, Bank],
    options: LowRankOptions,
    u_slots: int | None = None,
    v_slots: int | None = None,
) -> tuple[list[int], list[int]]:
    """Returns all ranks, DENSE last, and the parameters of each.

    A plan leaves out those that store no less than dense, in its budget's unit.

    Args:
        banks: The bank, as the steps before leave it; only shapes count.
        options: How the factors are stored.
        u_slots: Slots of U (by default one for each matrix, as for V).
        v_slots: Slots of V.
    """
    from mctk.terms import BankShape, rank_settings

    bank = only(banks)
    stored = matrices(bank).weight.shape[0]
    ranks, costs = rank_settings(
        BankShape(stored, bank.shape.out_features, bank.shape.in_features),
        stored if u_slots is None else u_slots,
        stored if v_slots is None else v_slots,
        options.rank_multiple,
        options.storage,
        beyond=True,
    )
    return list(ranks), list(costs)


def layout(
    banks: Mapping[str, Bank],
    size: int | None,
    options: LowRankOptions,
    u_slots: Sequence[int | None] | None = None,
    v_slots: Sequence[int | None] | None = None,
) -> dict[str, list[Term]]:
    """Returns the bank's terms on meta, its matrices replaced by a low-rank term of rank `size`.

    Args:
        banks: The bank, as the steps before leave it; only shapes count.
        size: The rank, or DENSE for no change.
        options: How the factors are stored.
        u_slots: Slot map of U (by default that of the matrices, as for V).
        v_slots: Slot map of V.
    """
    from mctk.terms import DENSE

    bank = only(banks)
    dense = matrices(bank)
    if size == DENSE:
        return {bank.name: list(bank.terms)}
    if size is None:
        raise ValueError("a low-rank term has no layout without its rank")
    left = dense.slots if u_slots is None else u_slots
    right = dense.slots if v_slots is None else v_slots
    term = _meta_low_rank(bank.shape, left, right, size, options.storage)
    return {bank.name: [term if other is dense else other for other in bank.terms]}


def _meta_low_rank(
    shape: BankShape,
    u_slots: Sequence[int | None],
    v_slots: Sequence[int | None],
    rank: int,
    storage: str,
) -> Term:
    """A low-rank term without data; pivoted, the identity is in the factor with fewer slots."""
    import torch

    from mctk.terms import Dense, LowRank

    def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    out, columns = shape.out_features, shape.in_features
    lefts = len({slot for slot in u_slots if slot is not None})
    rights = len({slot for slot in v_slots if slot is not None})
    left, right = meta(lefts, out, rank), meta(rights, rank, columns)
    if storage == "plain":
        return LowRank(shape, u_slots, v_slots, U=left, V=right)
    # At full rank pivoting leaves a dense matrix.
    if lefts <= rights and rank == out:
        return Dense(shape, v_slots, right)
    if lefts > rights and rank == columns:
        return Dense(shape, u_slots, left)
    if lefts <= rights:
        pivots = meta(lefts, rank, dtype=torch.int32)
        return LowRank(
            shape, u_slots, v_slots, C=meta(lefts, out - rank, rank), pivots=pivots, V=right
        )
    pivots = meta(rights, rank, dtype=torch.int32)
    return LowRank(
        shape, u_slots, v_slots, U=left, C=meta(rights, rank, columns - rank), pivots=pivots
    )


def matrices(bank: Bank) -> Dense:
    """Returns the term of a bank whose matrices are to be decomposed.

    That is the `Dense` term with most slots: the experts' own matrices, or what merging them left.
    A base that all members share, and biases, stay as they are.

    Raises:
        UserError: There is none, or it covers only some rows or columns.
    """
    most = bank.matrices()
    if most is None:
        kinds = ", ".join(term.kind for term in bank.terms) or "no terms"
        raise UserError(
            f"{bank.name} of layer {bank.layer} holds no full matrices to decompose ({kinds}): "
            "each bank can be decomposed once"
        )
    if most.rows is not None or most.cols is not None:
        raise UserError(
            f"{bank.name} of layer {bank.layer} was pruned to some of its channels before: "
            "decompose first, then prune"
        )
    return most


def members_of_slots(term: Dense) -> list[list[int]]:
    """Returns for every slot of a term the members that use it."""
    groups: list[list[int]] = [[] for _ in range(term.weight.shape[0])]
    for member, slot in enumerate(term.slots):
        if slot is not None:
            groups[slot].append(member)
    return groups


def tail_errors(spectrum: Tensor, settings: Sequence[int]) -> list[float]:
    """Returns what is lost at each setting: the sum of the dropped squared singular values.

    Args:
        spectrum: Squared singular values, descending, ``[n]``.
        settings: Ranks; DENSE loses nothing.
    """
    from mctk.terms import DENSE

    # Summed from the small end, so that small tails keep their digits and no tail exceeds a longer.
    tails = [*spectrum.flip(0).cumsum(0).flip(0).tolist(), 0.0]
    return [0.0 if rank == DENSE else tails[min(rank, len(tails) - 1)] for rank in settings]


def name_errors(bank: Bank, parts: Iterable[T]) -> Iterator[T]:
    """Yields what `parts` yields, one for each slot; bad numbers become an error with their place.

    Raises:
        UserError: A decomposition refused a matrix or its moment, say for NaN.
    """
    slot = 0
    try:
        for part in parts:
            yield part
            slot += 1
    except ValueError as error:
        raise UserError(f"{bank.name} of layer {bank.layer}, matrix {slot}: {error}") from error


def replace(
    bank: Bank,
    dense: Dense,
    parts: Iterable[Truncatable],
    size: int | None,
    options: LowRankOptions,
) -> list[Term]:
    """Returns the bank's terms with one of them truncated to rank `size`.

    Args:
        bank: The bank.
        dense: Its term to replace, as `matrices` found it.
        parts: A decomposition for each slot of it; consumed one by one.
        size: The rank, or DENSE for no change.
        options: How the factors are stored.

    Raises:
        UserError: No such rank exists.
    """
    import torch

    from mctk.terms import DENSE, LowRank

    if size == DENSE:
        return list(bank.terms)
    full = min(bank.shape.out_features, bank.shape.in_features)
    if size is None or not 1 <= size <= full:
        raise UserError(
            f"{bank.name} of layer {bank.layer}: rank {size} is not between 1 and {full}"
        )
    factors = [part.factors(size, balance=options.balance) for part in name_errors(bank, parts)]
    product = LowRank(
        bank.shape,
        dense.slots,
        dense.slots,
        U=torch.stack([u for u, _ in factors]),
        V=torch.stack([v for _, v in factors]),
    )
    term: Term = product.pivot() if options.storage == "pivoted" else product
    if term.parameters() > dense.parameters():
        log.warning(
            "%s of layer %d: rank %d stores more than the matrices that it replaces (%d, not %d)",
            bank.name,
            bank.layer,
            size,
            term.parameters(),
            dense.parameters(),
        )
    return [term if other is dense else other for other in bank.terms]
