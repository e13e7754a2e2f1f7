"""The arithmetic of weights stored in FP8 and MXFP4: numbers times scales, if these can be true.

A scale that is not finite, or negative, is damage. One of zero is right where all its numbers are
zero, and damage where they are not. And scales are refused that make numbers beyond what float16
can hold: no weight of a model is near it (one of 65504 would drown all others of its row), and what
a damaged file says there is mostly beyond it by far. Small scales are not looked at: those of
blocks of zeros may be as small as the writer liked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The values of four bits: a sign, two of exponent, one of mantissa (E2M1).
FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 65504.0  # of float16: beyond it no weight can be meant


def check_scales(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None, halves: bool = False
) -> str | None:
    """What of a weight's scales cannot be true, in words; None if nothing.

    Costs a pass over the scales, one for many numbers; the numbers are read only where a scale is
    suspicious.

    Args:
        values: The numbers, as stored.
        scales: Their scales, as stored.
        block: Rows and columns that share a scale; None: MXFP4, as gpt-oss's experts are.
        halves: Whether a byte holds two numbers.
    """
    import torch

    factors = _factors(scales)
    if not factors.numel():
        return None
    least, most = torch.stack([factors.min(), factors.max()]).tolist()
    if not bool(factors.isfinite().all()):
        return "some are not finite"
    if least < 0:
        return f"some are negative (the least is {least:.3g})"
    most_number = FOUR_BITS[-1] if halves or block is None else torch.finfo(values.dtype).max
    if least > 0 and most * most_number <= LARGEST:
        return None

    def dequantised(instead: torch.Tensor) -> torch.Tensor:
        if block is None:
            return from_mxfp4(values, instead, torch.float32)
        return from_blocks(values, instead, block, torch.float32, halves)

    if least == 0 and bool(dequantised((factors == 0).float()).any()):
        return "some are 0, and their numbers are not"
    largest = float(dequantised(factors).abs().max())
    if largest > LARGEST:
        return f"the largest, {most:.3g}, makes weights of up to {largest:.3g}"
    return None


def from_blocks(
    values: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    halves: bool = False,
) -> torch.Tensor:
    """Multiplies the blocks of matrices by their scales, in float32.

    Args:
        values: The numbers [..., rows, columns], or two a byte along the columns.
        scales: One, or [..., rows of blocks, columns of blocks].
        block: Rows and columns of a block; the last ones may be cut.
        dtype: Of the result.
        halves: Whether a byte holds two numbers.
    """
    import torch

    *lead, rows, columns = values.shape
    columns *= 2 if halves else 1
    found = torch.empty((*lead, rows, columns), dtype=dtype, device=values.device)
    matrices = values.reshape(-1, *values.shape[-2:])
    if scales.numel() == 1:
        factors = _factors(scales).reshape(1, 1, 1).expand(matrices.shape[0], 1, 1)
    else:
        factors = _factors(scales).reshape(-1, *scales.shape[-2:])
    for place, matrix, factor in zip(found.view(-1, rows, columns), matrices, factors, strict=True):
        numbers = _numbers(matrix) if halves else matrix.float()
        spread = factor.repeat_interleave(block[1], 1)[:, :columns]
        for strip, scale in zip(numbers.split(block[0]), spread, strict=True):
            strip.mul_(scale)
        place.copy_(numbers)
    return found


def from_mxfp4(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiplies blocks of four-bit numbers by their powers of two.

    Args:
        values: Two numbers a byte [E, out, G, B].
        scales: Exponents, 127 for 0 [E, out, G].
        dtype: Of the result.

    Returns:
        The matrices, transposed as gpt-oss holds them: [E, 2 G B, out].
    """
    import torch

    members, out, groups, held = values.shape
    found = torch.empty((members, groups * held * 2, out), dtype=dtype, device=values.device)
    for place, matrix, factor in zip(found, values, _factors(scales), strict=True):
        numbers = _numbers(matrix).mul_(factor[..., None])
        place.copy_(numbers.reshape(out, -1).T)
    return found


def _numbers(packed: torch.Tensor) -> torch.Tensor:
    """Four-bit numbers, two a byte, the lower half first: [..., n] → [..., 2 n] in float32."""
    import torch

    values = torch.tensor([*FOUR_BITS, *(-value for value in FOUR_BITS)], device=packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)  # of every byte
    halves = packed.contiguous().view(torch.uint8)
    found = pairs.index_select(0, halves.reshape(-1).int())
    return found.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _factors(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; bytes are exponents of two (E8M0), 127 for 0."""
    import torch

    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()
