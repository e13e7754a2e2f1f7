"""The element types that weight files hold: the one table of their names and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Dtype(NamedTuple):
    """An element type: its name in safetensors, its name in torch, its bytes."""

    name: str
    torch: str
    nbytes: int


# All that safetensors has and reads with torch; its types of less than a byte (F4, F6) it does not.
DTYPES = (
    Dtype("F64", "float64", 8),
    Dtype("F32", "float32", 4),
    Dtype("F16", "float16", 2),
    Dtype("BF16", "bfloat16", 2),
    Dtype("F8_E4M3", "float8_e4m3fn", 1),
    Dtype("F8_E5M2", "float8_e5m2", 1),
    Dtype("F8_E4M3FNUZ", "float8_e4m3fnuz", 1),
    Dtype("F8_E5M2FNUZ", "float8_e5m2fnuz", 1),
    Dtype("F8_E8M0", "float8_e8m0fnu", 1),
    Dtype("C64", "complex64", 8),
    Dtype("I64", "int64", 8),
    Dtype("I32", "int32", 4),
    Dtype("I16", "int16", 2),
    Dtype("I8", "int8", 1),
    Dtype("U64", "uint64", 8),
    Dtype("U32", "uint32", 4),
    Dtype("U16", "uint16", 2),
    Dtype("U8", "uint8", 1),
    Dtype("BOOL", "bool", 1),
)
DTYPE_BYTES = {dtype.name: dtype.nbytes for dtype in DTYPES}
_OF_TORCH = {dtype.torch: dtype.name for dtype in DTYPES}


def torch_dtypes() -> dict[str, torch.dtype]:
    """Name in safetensors → torch's dtype."""
    import torch

    return {dtype.name: getattr(torch, dtype.torch) for dtype in DTYPES}


def stored_name(dtype: torch.dtype | str) -> str:
    """The name in safetensors of one of torch's dtypes, or of its name."""
    return _OF_TORCH[str(dtype).removeprefix("torch.")]
