"""Pruning of single entries as methods: by magnitude, and by Wanda's score."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field, model_validator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import ChannelEnergy, Need
    from mctk.terms import Bank, BankShape, Dense, Term
    from torch import Tensor

PATTERNS: dict[str, tuple[int, int] | None] = {"unstructured": None, "2:4": (2, 4), "4:8": (4, 8)}


class EntryOptions(MethodOptions):
    """Options of every method that prunes single entries."""

    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        default="unstructured",
        description="unstructured: anywhere; 2:4 (4:8): the best 2 of 4 (4 of 8) neighbours in a "
        "row, which is half of them",
    )
    within: Literal["row", "matrix"] = Field(
        default="row", description="entries compete within their output row, or in the whole matrix"
    )
    storage: Literal["bitmap", "positions"] = Field(
        default="bitmap",
        description="a bit for each element of the matrix, or 4 bytes for each entry that stays: "
        "smaller below one entry in 32",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> EntryOptions:
        if self.pattern != "unstructured" and "within" in self.model_fields_set:
            raise ValueError(
                f"within has no effect: in a {self.pattern} pattern neighbours compete"
            )
        return self


class MagnitudeOptions(EntryOptions):
    """Options of `magnitude`."""

    within: Literal["row", "matrix"] = Field(
        default="matrix",
        description="entries compete within their output row, or in the whole matrix",
    )


class EntryPruning(Method):
    """What magnitude and Wanda pruning share; they differ in the scores.

    A size is how many entries of each row stay, or on average.
    """

    stage = "prune"
    takes_size = True
    # Entries are scored one by one: what several do together is not in it.
    units = "score"

    @abstractmethod
    def scores(self, bank: Bank, dense: Dense, statistics: Any) -> Iterator[Tensor]:
        """Yields the scores of each slot's entries, ``[R, C]``, not negative."""

    def sizes(self, banks: Layer, options: EntryOptions) -> tuple[list[int], list[int]]:
        """Entries a row and what they store in all, then dense."""
        from mctk.terms import DENSE

        from mctk_sparse.masks import sizes

        dense = _matrices(decompose.only(banks), options)
        stored, rows, columns = dense.weight.shape
        counts = sizes(columns, PATTERNS[options.pattern])
        costs = [stored * rows * count for count in counts]
        return [*counts, DENSE], [*costs, dense.weight.numel()]

    def layout(self, banks: Layer, size: int | None, options: EntryOptions) -> Terms:
        """A sparse term in place of the matrices."""
        import torch

        bank = decompose.only(banks)
        dense = _matrices(bank, options)
        _, rows, _ = dense.weight.shape
        mask = torch.empty(dense.weight.shape, dtype=torch.bool, device="meta")
        entries = rows * _entries(bank, dense, size, options)
        return {bank.name: _replaced(bank, dense, mask, entries, options)}

    def curve(self, banks: Layer, statistics: Any, options: EntryOptions) -> list[float]:
        """The sum of the squared scores of the entries that go, at each size."""
        from mctk_sparse.masks import dropped

        bank = decompose.only(banks)
        dense = _matrices(bank, options)
        counts = self.sizes(banks, options)[0][:-1]
        total = [0.0] * (len(counts) + 1)
        for scores in self.scores(bank, dense, statistics):
            found = dropped(scores, counts, PATTERNS[options.pattern], options.within == "row")
            for k, loss in enumerate(found):
                total[k] += loss
        return total

    def prune(
        self, layer: Layer, statistics: Any, size: int | None, options: EntryOptions
    ) -> Terms:
        """Keeps the entries with the highest scores."""
        import torch

        from mctk_sparse.masks import keep

        bank = decompose.only(layer)
        dense = _matrices(bank, options)
        count = _entries(bank, dense, size, options)
        pattern, by_row = PATTERNS[options.pattern], options.within == "row"
        scored = self.scores(bank, dense, statistics)
        mask = torch.stack([keep(scores, count, pattern, by_row) for scores in scored])
        entries = dense.weight.shape[1] * count
        return {bank.name: _replaced(bank, dense, mask, entries, options)}


class Magnitude(EntryPruning):
    """Keeps the largest entries of every matrix; needs no data.

    Han et al. (arXiv 1506.02626, section 4) take a multiple of the standard deviation for
    threshold, and train afterwards; here, as in later papers' baselines, a stated number stays.
    """

    name = "magnitude"
    summary = "Keeps the largest entries of every matrix; needs no data."
    reference = "Han et al., arXiv 1506.02626, section 4"
    Options = MagnitudeOptions

    def scores(self, bank: Bank, dense: Dense, statistics: Any) -> Iterator[Tensor]:
        """``|W_ij|``."""
        for slot in range(dense.weight.shape[0]):
            yield dense.weight[slot].float().abs()


class Wanda(EntryPruning):
    """Keeps the entries with the largest ``|W_ij| · ‖x_j‖₂`` of their row (arXiv 2306.11695).

    Section 3: the score is eq. 1; its square, eq. 4, is the curve. Layer after layer, on the
    outputs of pruned ones.
    """

    name = "wanda"
    summary = "Keeps entries by their size times the norm of the input that they meet (Wanda)."
    reference = "arXiv 2306.11695, section 3, eq. 1"
    Options = EntryOptions
    propagate = "compressed"

    def needs(self, shape: BankShape, bank: str, options: EntryOptions) -> list[Need]:
        """The energy of every input channel of each member."""
        return [_energy(bank)]

    def scores(self, bank: Bank, dense: Dense, statistics: Any) -> Iterator[Tensor]:
        """``|W_ij| · ‖x_j‖₂`` (eq. 1) over the tokens of the slot's members.

        Raises:
            UserError: No token reached the bank.
        """
        energy = slot_energy(bank, dense, statistics[_energy(bank.name)])
        for slot in range(dense.weight.shape[0]):
            weight = dense.weight[slot].float()
            norms = energy[slot].to(weight.device)
            if dense.cols is not None:
                norms = norms[(dense.cols if dense.cols.dim() == 1 else dense.cols[slot]).long()]
            yield weight.abs() * norms.sqrt()


def slot_energy(bank: Bank, dense: Dense, energy: Tensor) -> Tensor:
    """Returns the energy of each slot's input channels, float32 ``[S, in]``.

    Members that share a slot are summed. A slot that no token reached takes the sum over all
    members: the layer's inputs are the best guess at its own.

    Args:
        bank: The bank.
        dense: The term whose slots they are.
        energy: ``Σ x_j²`` over each member's tokens, ``[members, in]``.

    Raises:
        UserError: No token reached any member.
    """
    import torch

    whole = energy.float().sum(0)
    if not bool((whole > 0).any()):
        raise UserError(f"{bank.name} of layer {bank.layer}: no calibration token reached it")
    groups = decompose.members_of_slots(dense)
    found = [energy[group].float().sum(0) for group in groups]
    return torch.stack([own if bool((own > 0).any()) else whole for own in found])


def _energy(bank: str) -> ChannelEnergy:
    """The need: what enters down comes in the order that earlier steps left the neurons in."""
    from mctk.statistics import ChannelEnergy

    return ChannelEnergy(bank, of="current" if bank == "experts.down" else "original")


def _matrices(bank: Bank, options: EntryOptions) -> Dense:
    """Returns the term whose entries are pruned: the members' own matrices, or a merge's residuals.

    Raises:
        UserError: There is none, or its rows do not divide into the pattern's groups.
    """
    most = bank.matrices()
    place = f"{bank.name} of layer {bank.layer}"
    if most is None:
        kinds = ", ".join(term.kind for term in bank.terms) or "no terms"
        raise UserError(f"{place} holds no full matrices to prune ({kinds})")
    if type(most).kind != "dense":
        raise UserError(f"{place}: a {most.kind} term cannot lose single entries")
    pattern, columns = PATTERNS[options.pattern], most.weight.shape[2]
    if pattern is not None and columns % pattern[1]:
        raise UserError(
            f"{place}: rows of {columns} do not divide into groups of {pattern[1]}: "
            f"pattern {options.pattern} does not fit"
        )
    return most


def _entries(bank: Bank, dense: Dense, size: int | None, options: EntryOptions) -> int:
    """Returns how many entries of a row stay.

    Raises:
        UserError: There are not so many, or the pattern keeps another number.
    """
    from mctk.terms import DENSE

    from mctk_sparse.masks import sizes

    columns, pattern = dense.weight.shape[2], PATTERNS[options.pattern]
    if size == DENSE:
        return columns
    if size is None or not 1 <= size <= columns:
        raise UserError(
            f"{bank.name} of layer {bank.layer}: cannot keep {size} of {columns} entries of a row"
        )
    if pattern is not None and size not in sizes(columns, pattern):
        raise UserError(
            f"{bank.name} of layer {bank.layer}: pattern {options.pattern} keeps "
            f"{sizes(columns, pattern)[0]} of {columns} entries of a row, not {size}"
        )
    return size


def _replaced(
    bank: Bank, dense: Dense, mask: Tensor, entries: int, options: EntryOptions
) -> list[Term]:
    """The bank's terms with the masked entries in place of the matrices.

    Args:
        bank: The bank.
        dense: Its matrices.
        mask: Which entries stay, bool ``[S, R, C]``.
        entries: How many those are in each slot.
        options: How they are stored.
    """
    from mctk.terms import sparse_from_mask

    if entries == dense.weight[0].numel():
        return list(bank.terms)
    sparse = sparse_from_mask(
        bank.shape,
        dense.slots,
        dense.weight,
        mask,
        options.storage,
        entries=entries,
        rows=dense.rows,
        cols=dense.cols,
    )
    return [sparse if term is dense else term for term in bank.terms]
