"""The residuals' compression where an expert's matrices are taken together: `up`, `joint_svd`.

Both work on the `Dense` term with most slots of every bank: after a merge the residuals, without
one the experts' own matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.decompose import LowRankOptions, part_of
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mctk.hookspecs import Layer, Terms
    from mctk.terms import Bank, Dense, Term
    from torch import Tensor

# Settings of `up`: multiples of 0.5 % of an expert's entries.
_STEPS = 200


class UpOptions(MethodOptions):
    """Options of `up`."""

    storage: Literal["bitmap", "positions"] = Field(
        default="bitmap",
        description="how it is stored where entries are: bitmap, one bit for every entry of the "
        "matrix; positions, an int32 for each that stays, smaller only below one in 32",
    )
    entry_multiple: int = Field(
        default=512,
        ge=1,
        description="the numbers of entries that an expert keeps in gate, up and down are rounded "
        "to multiples of it, so that a quantize step finds whole groups; 1: one threshold, exactly",
    )


class UnstructuredPruning(Method):
    """Magnitude pruning of single entries, one threshold an expert.

    ResMoE's "UP" (arXiv 2503.06881); the authors' `res_compress` prunes the design matrix as one.
    """

    stage = "prune"
    name = "up"
    scope = "experts"
    summary = "Keeps each expert's largest entries, by one threshold over gate, up and down."
    reference = "arXiv 2503.06881"
    Options = UpOptions
    takes_size = True
    # It knows what it removes from the weights, not what that does to any output.
    units = "score"

    def sizes(self, banks: Layer, options: UpOptions) -> tuple[list[int], list[int]]:
        """How many entries of an expert stay, over all its matrices; then dense."""
        from mctk.terms import DENSE

        residuals = _residuals(banks)
        entries, slots = _entries(residuals), _slots(residuals)
        unit = options.entry_multiple
        counts = sorted({entries * k // _STEPS // unit * unit for k in range(1, _STEPS)} - {0})
        return [*counts, DENSE], [slots * n for n in (*counts, entries)]

    def layout(self, banks: Layer, size: int | None, options: UpOptions) -> Terms:
        """As many entries as will be stored; how they divide among the banks, data will tell."""
        import torch
        from mctk.terms import DENSE

        residuals = _residuals(banks)
        if size == DENSE:
            return {name: list(bank.terms) for name, bank in banks.items()}
        unit = options.entry_multiple
        units = _counted(banks, size, residuals, options) // unit
        parts = len(residuals)
        result: dict[str, list[Term]] = {}
        for number, (name, dense) in enumerate(residuals.items()):
            share = units // (parts - number)
            units -= share
            mask = torch.empty(dense.weight.shape, dtype=torch.bool, device="meta")
            result[name] = _replaced(
                banks[name], dense, _sparse(dense, mask, options, share * unit)
            )
        return result

    def prune(self, layer: Layer, statistics: Any, size: int | None, options: UpOptions) -> Terms:
        """Keeps `size` entries of every expert."""
        import torch
        from mctk.terms import DENSE

        from mctk_resmoe.residuals import largest

        residuals = _residuals(layer)
        if size == DENSE:
            return {name: list(bank.terms) for name, bank in layer.items()}
        count = _counted(layer, size, residuals, options)
        unit = options.entry_multiple
        kept = [largest(parts, count, unit) for parts in _by_slot(residuals)]
        result: dict[str, list[Term]] = {}
        for name, dense in residuals.items():
            mask = torch.stack([masks[part_of(name)] for masks in kept])
            result[name] = _replaced(layer[name], dense, _sparse(dense, mask, options))
        return result


class JointSvd(Method):
    """Low-rank factors of an expert's gate, up and down with one U on the side of its neurons.

    ResMoE's SVD (arXiv 2503.06881) in the form of the authors' `ResmoeMixtralTop2MLP`, which counts
    U once; here it is stored and counted in each bank.
    """

    stage = "prune"
    name = "joint_svd"
    scope = "experts"
    summary = "Truncated SVD of each expert's [gate | up | downᵀ]: one U for the three matrices."
    reference = "arXiv 2503.06881"
    Options = LowRankOptions
    takes_size = True
    units = "score"

    def sizes(self, banks: Layer, options: LowRankOptions) -> tuple[list[int], list[int]]:
        """All ranks, then dense; U is stored in every bank, and counted there."""
        from mctk.terms import BankShape, rank_settings

        residuals = _residuals(banks)
        first = next(iter(residuals.values()))
        stored = _slots(residuals) * len(residuals)
        ranks, costs = rank_settings(
            BankShape(stored, first.shape.out_features, first.shape.in_features),
            stored,
            stored,
            options.rank_multiple,
            options.storage,
            beyond=True,
        )
        return list(ranks), list(costs)

    def layout(self, banks: Layer, size: int | None, options: LowRankOptions) -> Terms:
        """Two factors for every matrix."""
        from mctk.terms import DENSE

        result: dict[str, list[Term]] = {}
        for name, dense in _residuals(banks).items():
            if size != DENSE:
                _checked(banks, size, min(dense.shape.out_features, dense.shape.in_features))
            result |= decompose.layout({name: banks[name]}, size, options)
        return result

    def prune(
        self, layer: Layer, statistics: Any, size: int | None, options: LowRankOptions
    ) -> Terms:
        """Replaces every expert's matrices by factors of rank `size` of all of them together."""
        import torch
        from mctk.terms import DENSE, LowRank

        from mctk_resmoe.residuals import factors_by_part, joint

        residuals = _residuals(layer)
        if size == DENSE:
            return {name: list(bank.terms) for name, bank in layer.items()}
        first = next(iter(residuals.values()))
        rank = _checked(layer, size, min(first.shape.out_features, first.shape.in_features))
        found = []
        for slot, parts in enumerate(_by_slot(residuals)):
            try:
                left, right = joint(parts).factors(rank, balance=options.balance)
            except ValueError as error:
                raise UserError(f"{_place(layer)}, matrix {slot}: {error}") from error
            found.append(factors_by_part(left, right, parts))
        result: dict[str, list[Term]] = {}
        for name, dense in residuals.items():
            own = [factors[part_of(name)] for factors in found]
            term = LowRank(
                dense.shape,
                dense.slots,
                dense.slots,
                U=torch.stack([u for u, _ in own]),
                V=torch.stack([v for _, v in own]),
            )
            stored: Term = term.pivot() if options.storage == "pivoted" else term
            result[name] = _replaced(layer[name], dense, [stored])
        return result


def _place(layer: Layer) -> str:
    return f"experts of layer {next(iter(layer.values())).layer}"


def _residuals(layer: Layer) -> dict[str, Dense]:
    """Returns every bank's matrices that are to be compressed.

    Raises:
        UserError: A bank has none, or the banks' experts share them differently.
    """
    found = {name: decompose.matrices(bank) for name, bank in layer.items()}
    first = next(iter(found.values()))
    for name, dense in found.items():
        if dense.slots != first.slots:
            raise UserError(f"{name} of {_place(layer)} shares matrices in another way than others")
    return found


def _slots(residuals: dict[str, Dense]) -> int:
    return next(iter(residuals.values())).weight.shape[0]


def _entries(residuals: dict[str, Dense]) -> int:
    """Entries of one expert over all its matrices."""
    return sum(dense.weight[0].numel() for dense in residuals.values())


def _by_slot(residuals: dict[str, Dense]) -> Iterator[dict[str, Tensor]]:
    """Yields each expert's matrices by part, float32."""
    for slot in range(_slots(residuals)):
        yield {part_of(name): dense.weight[slot].float() for name, dense in residuals.items()}


def _checked(layer: Layer, size: int | None, most: int) -> int:
    if size is None or not 1 <= size <= most:
        raise UserError(f"size {size} of the {_place(layer)} is not between 1 and {most}")
    return size


def _counted(
    layer: Layer, size: int | None, residuals: dict[str, Dense], options: UpOptions
) -> int:
    """Returns how many entries of an expert stay."""
    count = _checked(layer, size, _entries(residuals))
    if count % options.entry_multiple:
        raise UserError(
            f"size {count} of the {_place(layer)} is no multiple of entry_multiple, "
            f"{options.entry_multiple}"
        )
    return count


def _sparse(
    dense: Dense, mask: Tensor, options: UpOptions, entries: int | None = None
) -> list[Term]:
    """Returns a term for every slot: experts keep different numbers of entries in one bank.

    Args:
        dense: What the entries are of.
        mask: Which of them stay, ``[S, out, in]``.
        options: How it is stored where they are.
        entries: How many stay of each slot, where there is no data to tell.
    """
    from mctk.terms import sparse_from_mask

    terms: list[Term] = []
    for slot in range(mask.shape[0]):
        own = slice(slot, slot + 1)
        slots = [0 if s == slot else None for s in dense.slots]
        terms.append(
            sparse_from_mask(
                dense.shape,
                slots,
                dense.weight[own].float(),
                mask[own],
                options.storage,
                entries=entries,
            )
        )
    return terms


def _replaced(bank: Bank, dense: Dense, terms: list[Term]) -> list[Term]:
    """Returns a bank's terms with others in the place of one."""
    return [new for term in bank.terms for new in (terms if term is dense else [term])]
