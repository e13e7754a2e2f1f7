"""Rounds a term's weights to nearest, in groups, into packed tensors (`mctk.terms.packing`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mctk.terms.bits import pack_bits
from mctk.terms.indices import dtype_name
from mctk.terms.packing import BITS, PackedTensor

if TYPE_CHECKING:
    from mctk.terms.term import Term


def pack(
    term: Term,
    bits: int,
    group: int | None = 64,
    symmetric: bool = True,
    tensors: Iterable[str] | None = None,
) -> Term:
    """Returns the term with weights stored in few bits, rounded to nearest.

    Args:
        term: Of any kind; what is packed already is packed anew. On the meta device shapes come out
            right.
        bits: Bits of a weight: 2, 3, 4 or 8.
        group: How many neighbours in a row share a scale; None: all of the row.
        symmetric: Without zero points: the group's largest weight in size gets the code 0, which
            stands for ``-2^(bits - 1)`` scales (a scale may be negative), and what lies opposite is
            cut off at ``2^(bits - 1) - 1`` of them. Otherwise levels are spread from the least to
            the largest weight (and 0), and the one that stands for 0 is stored.
        tensors: Which of the term's floating tensors; by default all but those that the kind names
            in `Term.plain`.

    Raises:
        ValueError: Bits or group are impossible, a tensor is unknown or holds NaN or infinity.
    """
    held = term.tensors()
    floating = [name for name, tensor in held.items() if tensor.is_floating_point()]
    names = [name for name in floating if name not in term.plain] if tensors is None else tensors
    packed: dict[str, Tensor] = {}
    for name in names:
        if name not in floating:
            raise ValueError(f"tensors: a {term.kind} term has no weights '{name}'")
        try:
            packed[name] = quantise(held[name], bits, group, symmetric)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return term.with_tensors({**held, **packed})


def quantise(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> PackedTensor:
    """Rounds a tensor ``[..., n]`` to nearest in groups along its last dimension; see `pack`.

    0 is a level of every group. A group of zeros gets the scale 0.
    """
    if bits not in BITS:
        raise ValueError(f"bits: must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise ValueError(f"group: must be a positive integer, not {group!r}")
    if not weight.is_floating_point() or weight.dim() < 1:
        raise ValueError(f"is {dtype_name(weight.dtype)}, not floating point")
    if isinstance(weight, PackedTensor):
        weight = weight.unpack()
    n = weight.shape[-1]
    width = max(1, n if group is None else min(group, n))
    if weight.dim() == 1 or weight.shape[0] == 0 or weight.is_meta:
        codes, scales, zeros = _rounded(weight, bits, width, symmetric)
    else:
        # Slot by slot: what rounding needs beside the result is a few times one slot.
        parts = [_rounded(part, bits, width, symmetric) for part in weight]
        codes, scales, zeros = (torch.stack(part) for part in zip(*parts, strict=True))
    return PackedTensor(
        pack_bits(codes, bits),
        scales.to(weight.dtype),
        None if symmetric else pack_bits(zeros, bits),
        bits=bits,
        group=width,
        shape=weight.shape,
    )


def _rounded(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[..., n]``, scales and zero points ``[..., G]`` of a tensor ``[..., n]``."""
    n = weight.shape[-1]
    groups = -(-n // group)
    if weight.is_meta:  # plans lay out terms of every size; rounding nothing takes its time too
        scales = weight.new_empty((*weight.shape[:-1], groups))
        return weight.to(torch.uint8), scales, scales.to(torch.uint8)
    values = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(values.isfinite().all()):
        raise ValueError("holds NaN or infinity")
    # Filled up with zeros: they lie in every range.
    values = torch.nn.functional.pad(values, (0, groups * group - n))
    values = values.unflatten(-1, (groups, group))
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales = torch.where(high > -low, high, low) / -middle
    else:
        scales = high / levels - low / levels
    # A scale that bfloat16 can hold, and the storage dtype as well.
    most = torch.finfo(weight.dtype).max
    scales = scales.to(torch.bfloat16).to(values.dtype).clamp(-most, most)
    steps = torch.where(scales != 0, scales, torch.ones_like(scales))
    zeros = torch.full_like(low, middle) if symmetric else (-low / steps).round().clamp(0, levels)
    codes = (values / steps[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, levels).flatten(-2)[..., :n]
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)
