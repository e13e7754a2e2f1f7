"""Weights that a checkpoint stores quantised, as the tensors that they stand for.

A `Source` shows such a checkpoint as the ordinary one that it was made from: the weights by their
usual names and shapes, in the dtype of config.json, without `quantization_config`. They are
dequantised when they are read, one tensor at a time; names and shapes follow from headers alone.

- *FP8* (DeepSeek-V3 and others): `X.weight` in 8 bits and, for every block of it (128 × 128, say),
  a scale in `X.weight_scale_inv`. Blocks at the edges are cut where the block's size does not
  divide the matrix's, as that of DeepSeek-V3's `kv_a_proj_with_mqa` (576 rows) does not. (What
  transformers 5.24 dequantises itself it divides evenly, and refuses where it cannot.) A block that
  config.json does not name is its default's, 128 × 128. DeepSeek-V4 stores its experts two 4-bit
  numbers a byte under the same names, in other blocks: what config.json names does not fit them,
  and their scales say the size. They can where it is a power of two, as blocks' sizes are: between
  `size / count` and `size / (count - 1)` lies one at most.
- *MXFP4* (gpt-oss): `X_blocks [E, out, G, 16]`, two numbers a byte, and for each block of 32 an
  exponent in `X_scales [E, out, G]`; they stand for `X [E, in, out]`, in = 32 G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import stored_name, torch_dtypes
from ..errors import CheckpointError
from ..models import SETTINGS, quantisation, text_part
from .dequantise import check_scales, from_blocks, from_mxfp4

if TYPE_CHECKING:
    import torch

    from .source import TensorInfo

FP8 = ("F8_E4M3", "F8_E5M2")
# Where the scales of a weight X.weight are; a fused parameter's have the first form only.
SCALES = ("{name}_scale_inv", "{stem}.scale", "{stem}.qscale_weight")
# Scales of what enters a matrix at run time; in other arithmetic they mean nothing.
OF_INPUTS = (
    "{name}_activation_scale",
    "{stem}.activation_scale",
    "{stem}.input_scale",
    "{stem}.qscale_act",
)
DEFAULT_BLOCK = (128, 128)  # where config.json names none: transformers' FineGrainedFP8Config
SHOWN = ("bfloat16", "float16", "float32")  # the dtypes to dequantise into, by torch's names


@dataclass(frozen=True)
class Packed:
    """How a weight is stored.

    Attributes:
        info: The tensor that it stands for.
        values: The stored tensor with its numbers.
        scales: The stored tensor with their scales.
        parts: All stored tensors that it replaces: the two, and scales of no use here.
        where: The file that holds the scales.
        block: How many rows and columns share a scale; None: stored as gpt-oss's experts are.
        halves: Whether a byte holds two numbers of four bits.
    """

    info: TensorInfo
    values: str
    scales: str
    parts: tuple[str, ...]
    where: Path
    block: tuple[int, int] | None = None
    halves: bool = False

    def read(
        self, slices: Mapping[str, Any], device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Reads and dequantises it.

        Args:
            slices: The stored tensors, as `Source.slices` opens them.
            device: Where to compute; by default on the CPU.

        Raises:
            CheckpointError: Its scales cannot be true; names their tensor and file.
        """
        values = slices[self.values][...].to(device)
        scales = slices[self.scales][...].to(device)
        dtype = torch_dtypes()[self.info.dtype]
        wrong = check_scales(values, scales, self.block, self.halves)
        if wrong is not None:
            raise CheckpointError(
                f"{self.where}: tensor {self.scales}, the scales of {self.values}: {wrong}; the "
                "file is damaged, or was not written as its config.json says"
            )
        if self.block is None:
            return from_mxfp4(values, scales, dtype)
        return from_blocks(values, scales, self.block, dtype, self.halves)


class LazyWeight:
    """A dequantised tensor, read like one of safetensors' slices."""

    def __init__(
        self, packed: Packed, slices: Mapping[str, Any], device: str | torch.device | None
    ) -> None:
        self._packed, self._slices, self._device = packed, slices, device

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._packed.info.shape)

    def get_dtype(self) -> str:
        """Its dtype, by safetensors' name."""
        return self._packed.info.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._packed.read(self._slices, self._device)[index]


@dataclass(frozen=True)
class Quantised:
    """A checkpoint's quantised weights.

    Attributes:
        method: What config.json calls the format.
        packed: Name of a weight → how it is stored.
        dtype: The dtype in which the weights are shown, by torch's name.
    """

    method: str
    packed: dict[str, Packed]
    dtype: str

    @property
    def label(self) -> str:
        """The format as people call it."""
        return self.method.upper()


def unquantised(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says nothing of quantised weights, but in which dtype they are."""
    found = {key: value for key, value in config.items() if key not in SETTINGS}
    inner = text_part(config)
    if inner:
        found["text_config"] = {k: value for k, value in inner.items() if k not in SETTINGS}
    if _dtype(found) is None:
        found["torch_dtype"] = dtype
    return found


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The floating-point dtype that config.json names, if it is one to compute in."""
    for part in (config, text_part(config)):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in SHOWN:
                return part[key]
    return None


def find_quantised(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Quantised | None:
    """Finds the weights that are stored quantised, from config.json and headers.

    Args:
        path: The model directory.
        config: Its config.json.
        tensors: Its headers.

    Returns:
        None where config.json says of none, or names a format that is not read (opening the model
        refuses it).

    Raises:
        CheckpointError: A weight's scales are missing or do not fit it; or there is none.
    """
    said = quantisation(config)
    if said is None or said[1] not in READERS:
        return None
    key, method, settings = said
    dtype = _dtype(config) or "bfloat16"
    packed = dict(READERS[method](path, tensors, settings, stored_name(dtype)))
    if not packed:
        raise CheckpointError(
            f"{path / 'config.json'}: {key} says {method!r}, but no tensor is stored that way; if "
            "the weights are bfloat16, float16 or float32, delete the key"
        )
    return Quantised(method, packed, dtype)


def _fp8(
    path: Path, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any], dtype: str
) -> Iterable[tuple[str, Packed]]:
    """The weights of a checkpoint in FP8."""
    from .source import TensorInfo

    block = _declared(path, settings)
    for name, info in tensors.items():
        places = {"name": name, "stem": name.removesuffix(".weight")}
        forms = SCALES if name.endswith(".weight") else SCALES[:1]
        scales = next((f for f in (form.format(**places) for form in forms) if f in tensors), None)
        halves = info.dtype == "I8" and scales is not None
        if info.dtype not in FP8 and not halves:
            continue
        where = f"{path / info.file}: tensor {name}"
        if scales is None:
            raise CheckpointError(
                f"{where} is stored in FP8, and its scales are not there "
                f"({SCALES[0].format(**places)})"
            )
        if len(info.shape) < 2:
            raise CheckpointError(f"{where} is stored in FP8, and is no matrix")
        shape = (*info.shape[:-1], info.shape[-1] * (2 if halves else 1))
        others = [form.format(**places) for form in OF_INPUTS]
        parts = (name, scales, *(other for other in others if other in tensors))
        strict = "weight_block_size" in settings and block is not None and not halves
        grid = _block(where, shape, tensors[scales], block, strict)
        yield (
            name,
            Packed(
                TensorInfo(name, info.file, dtype, shape),
                name,
                scales,
                parts,
                path / tensors[scales].file,
                grid,
                halves,
            ),
        )


def _declared(path: Path, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale by config.json; None where it says that all do (null).

    Raises:
        CheckpointError: It says neither.
    """
    said = settings.get("weight_block_size", DEFAULT_BLOCK)
    if said is None:
        return None
    if not (
        isinstance(said, list | tuple)
        and len(said) == 2
        and all(type(size) is int and size > 0 for size in said)
    ):
        raise CheckpointError(
            f"{path / 'config.json'}: weight_block_size is {said!r}; write the rows and columns "
            "that share a scale, such as [128, 128]"
        )
    return said[0], said[1]


def _block(
    where: str,
    shape: tuple[int, ...],
    scales: TensorInfo,
    declared: tuple[int, int] | None,
    strict: bool,
) -> tuple[int, int]:
    """How many rows and columns of a weight share a scale.

    Args:
        where: The weight, in words.
        shape: Its shape [..., rows, columns].
        scales: Its scales: one, or [..., rows of blocks, columns of blocks].
        declared: What config.json says, or what is usual where it does not.
        strict: Whether it does: then other scales are damaged. (Of experts in four bits it says
            nothing.)

    Raises:
        CheckpointError: The scales fit no blocks, or blocks of more than one size.
    """
    whole = declared and all(
        size <= block for size, block in zip(shape[-2:], declared, strict=True)
    )
    if scales.numel == 1 and (len(scales.shape) < 2 or whole or not strict):
        return shape[-2], shape[-1]
    grid = scales.shape
    words = f"{where} has shape {list(shape)}, and its scales {scales.name} have {list(grid)}"
    if len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        raise CheckpointError(f"{words}: no blocks of equal size")
    axes = list(zip(shape[-2:], grid[-2:], strict=True))
    if declared and all(
        math.ceil(size / block) == count
        for (size, count), block in zip(axes, declared, strict=True)
    ):
        return declared
    if strict and declared:
        raise CheckpointError(
            f"{words}: not the blocks of {declared[0]} × {declared[1]} that config.json's "
            "weight_block_size says"
        )
    if any(count == 0 or size % count for size, count in axes):
        raise CheckpointError(f"{words}: no blocks of equal size")
    rows, columns = (size // count for size, count in axes)
    # One scale along an axis is of the whole of it, whatever the block's size.
    if any(
        count > 1 and block & (block - 1)
        for (_, count), block in zip(axes, (rows, columns), strict=True)
    ):
        raise CheckpointError(
            f"{words}: blocks of {rows} × {columns}, or larger ones of which the last are cut? "
            "Write their rows and columns as weight_block_size into config.json's "
            "quantization_config"
        )
    return rows, columns


def _mxfp4(
    path: Path, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any], dtype: str
) -> Iterable[tuple[str, Packed]]:
    """The weights of a checkpoint in MXFP4."""
    from .source import TensorInfo

    for values, info in tensors.items():
        name = values.removesuffix("_blocks")
        if name == values or info.dtype != "U8":
            continue
        scales = name + "_scales"
        where = f"{path / info.file}: tensor {values}"
        if scales not in tensors:
            raise CheckpointError(f"{where} is stored in MXFP4, and {scales} is not there")
        if len(info.shape) != 4 or tensors[scales].shape != info.shape[:-1]:
            raise CheckpointError(
                f"{where} has shape {list(info.shape)}, and {scales} has "
                f"{list(tensors[scales].shape)}: they do not fit together"
            )
        members, out, groups, held = info.shape
        shape = (members, groups * held * 2, out)
        yield (
            name,
            Packed(
                TensorInfo(name, info.file, dtype, shape),
                values,
                scales,
                (values, scales),
                path / tensors[scales].file,
            ),
        )


READERS: dict[str, Callable[..., Iterable[tuple[str, Packed]]]] = {"fp8": _fp8, "mxfp4": _mxfp4}
