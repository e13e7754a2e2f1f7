"""Small integers without gaps in the bytes of a row, and back (docs/format.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers ``[..., n]`` below ``2^bits`` into uint8 ``[..., ⌈n · bits / 8⌉]``.

    Bits are 1 (a mask), 2, 3, 4 or 8.

    Value i of a row occupies bits ``i·bits .. (i+1)·bits - 1`` of the row, where bit j is bit
    ``j mod 8``, of value ``2^(j mod 8)``, of byte ``⌊j / 8⌋``. What is left of the last byte is 0.
    """
    n = values.shape[-1]
    if bits == 8:
        return values.to(torch.uint8)
    if values.is_meta:  # plans lay out hundreds of sizes
        shape = (*values.shape[:-1], packed_width(n, bits))
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    unit = 8 if bits == 3 else 8 // bits
    filled = torch.nn.functional.pad(values.to(torch.int32), (0, -n % unit))
    filled = filled.unflatten(-1, (filled.shape[-1] // unit, unit))
    word = filled[..., 0]
    for i in range(1, unit):
        word = word | (filled[..., i] << (bits * i))
    used = bits * unit // 8
    pieces = [(word >> (8 * byte)) & 255 for byte in range(used)]
    packed = torch.stack(pieces, dim=-1).flatten(-2).to(torch.uint8)
    return packed[..., : packed_width(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 ``[..., n]``."""
    if bits == 8:
        return packed
    if bits == 3:
        filled = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3))
        a, b, c = filled.unflatten(-1, (filled.shape[-1] // 3, 3)).unbind(-1)
        pieces = [
            a,
            a >> 3,
            (a >> 6) | (b << 2),
            b >> 1,
            b >> 4,
            (b >> 7) | (c << 1),
            c >> 2,
            c >> 5,
        ]
        pieces = [piece & 7 for piece in pieces]
    else:
        pieces = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(pieces, dim=-1).flatten(-2)[..., :n]


def packed_width(n: int, bits: int) -> int:
    """How many bytes n values of a row take."""
    return -(-n * bits // 8)
