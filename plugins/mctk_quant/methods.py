"""Round-to-nearest as a method; the rounding itself is `mctk.terms.pack`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk.errors import UserError, nearest
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.terms import Bank, Term
    from torch import Tensor

# Bytes of a weight, and of a group's scale, in the comparison that decides what is worth packing.
# Not those of the terms at hand, which are float32 between passes and 16 bits wide in a plan.
_BYTES = 2


class RtnOptions(MethodOptions):
    """Options of `rtn`."""

    bits: Literal[8, 4, 3, 2] = Field(default=4, description="bits of a weight")
    group: int | None = Field(
        default=64,
        ge=1,
        description="neighbours in a row that share a scale and a zero point; null: all of the row",
    )
    symmetric: bool = Field(
        default=True,
        description="no zero points: the group's largest weight gets the outermost level, on its "
        "side of 0; otherwise levels are spread from the least to the largest weight",
    )
    only: list[str] | None = Field(
        default=None,
        min_length=1,
        description="which weights: kinds of term, as lowrank, or a tensor of one, as lowrank.V; "
        "by default all but biases and the energies of dynamic bases",
    )


class Rtn(Method):
    """Rounds stored weights to nearest in groups along the input dimension, and packs them.

    The baseline "RTN" of GPTQ (arXiv 2210.17323, section 5), whose asymmetric grid is
    ``symmetric: false``; symmetric is AWQ's step (arXiv 2306.00978, eq. 1) with the sign of
    llama.cpp's Q4_0.
    """

    stage = "quantize"
    name = "rtn"
    summary = "Round-to-nearest group quantisation of any stored weights to 8, 4, 3 or 2 bits."
    reference = "arXiv 2210.17323, section 5 (RTN)"
    Options = RtnOptions

    def layout(self, banks: Layer, size: int | None, options: RtnOptions) -> Terms:
        """The same terms, packed: what fits is known without data."""
        return {name: [_packed(term, bank, options) for term in bank.terms]
                for name, bank in banks.items()}  # fmt: skip

    def quantize(
        self, layer: Layer, statistics: Any, size: int | None, options: RtnOptions
    ) -> Terms:
        """Packs every chosen weight tensor that gets smaller by it."""
        return self.layout(layer, size, options)


def _packed(term: Term, bank: Bank, options: RtnOptions) -> Term:
    from mctk.terms import LowRank, pack

    from mctk_quant.factors import even_columns

    held = term.tensors()
    names = [name for name in _chosen(term, bank, options.only) if _worth(held[name], options)]
    if not names:
        return term
    if isinstance(term, LowRank) and "U" in names:
        term = even_columns(term)
    try:
        return pack(term, options.bits, options.group, options.symmetric, names)
    except ValueError as error:
        raise UserError(
            f"{bank.name} of layer {bank.layer}: the {term.kind} term's {error}"
        ) from error


def _chosen(term: Term, bank: Bank, only: list[str] | None) -> list[str]:
    """The term's weight tensors that options ask for.

    Raises:
        UserError: A kind is unknown, or has no such weights here.
    """
    from mctk.terms import kinds

    floating = [name for name, t in term.tensors().items() if t.is_floating_point()]
    if only is None:
        return [name for name in floating if name not in term.plain]
    found: list[str] = []
    for entry in only:
        kind, _, name = entry.partition(".")
        if kind not in kinds():
            raise UserError(f"only: '{kind}' is no kind of term{nearest(kind, kinds())}")
        if kind != term.kind:
            continue
        if name and name not in floating:
            raise UserError(
                f"only: the {kind} term of {bank.name} in layer {bank.layer} stores no weights "
                f"'{name}', but {', '.join(floating)}"
            )
        found += [name] if name else [name for name in floating if name not in term.plain]
    return list(dict.fromkeys(found))


def _worth(tensor: Tensor, options: RtnOptions) -> bool:
    """Whether packing makes a tensor ``[..., n]`` smaller: short rows may not pay for a scale."""
    n = tensor.shape[-1]
    if not n:
        return False
    groups = -(-n // (options.group or n))
    packed = -(-n * options.bits // 8) + _BYTES * groups
    packed += 0 if options.symmetric else -(-groups * options.bits // 8)
    return packed < _BYTES * n
