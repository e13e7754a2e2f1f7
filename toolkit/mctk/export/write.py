"""Writes an export, a layer at a time: multiplied out, put under the original's names, dropped."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from ..checkpoint.fewer import ONE_EXPERT
from ..engine.shards import copy_companions, copy_tensors, shard_name, write_index
from ..errors import UserError
from ..files import room_for, write_json, write_tensors
from ..models import bank_sites, read_banks, write_banks
from .layout import Constants, LayerLayout, Layout, restored

if TYPE_CHECKING:
    from torch import nn

    from ..terms import Bank


@contextlib.contextmanager
def building(output: Path) -> Iterator[Path]:
    """A directory to write in beside `output`, which becomes `output` if nothing fails.

    Raises:
        UserError: `output` exists, or another export is at work on it.
    """
    if output.exists():
        raise UserError(f"{output}: exists already; give another --output, or remove it")
    place = output.with_name(f".{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.lock")
    lock = FileLock(str(beside))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{output}: another export is at work on it") from None
    try:
        if place.exists():  # of an export that was killed
            shutil.rmtree(place)
        place.mkdir()
        yield place
        place.rename(output)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        beside.unlink(missing_ok=True)
        lock.release()


def check_disk(output: Path, need: int) -> None:
    """Refuses to begin what would fill the disk.

    Args:
        output: The directory that will be made.
        need: Bytes that it will take.
    """
    place, free = room_for(output)
    if need > free:
        raise UserError(
            f"{output}: needs {need / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free"
        )


def write_model(layout: Layout, place: Path, progress: Callable[[int, int], None]) -> None:
    """Writes shards, index, config.json and what goes with a model.

    Args:
        layout: What to write.
        place: The directory.
        progress: Is called with (layers written, layers).
    """
    count = len(layout.layers)
    files = [shard_name(-1, count)]
    copy_tensors(layout.model.source, layout.outer, place / files[0])
    for index, layer in enumerate(layout.layers):
        files.append(shard_name(index, count))
        write_tensors(place / files[-1], layer_tensors(layout, index, layer))
        progress(index + 1, count)
    write_index(place, files, {})
    copy_companions(layout.model.source, place)
    write_json(place / "config.json", layout.config)


def layer_tensors(layout: Layout, index: int, layer: LayerLayout) -> dict[str, torch.Tensor]:
    """All tensors of one layer by the names that they are written under.

    Raises:
        UserError: Values overflow the dtype that they are to be written in.
    """
    tensors: dict[str, torch.Tensor] = {}
    if layer.modules:
        prefix = f"{layout.model.layers_path}.{index}."
        dense = layout.dense.get_submodule(prefix.rstrip("."))
        with layout.model.layer(index) as module:
            matrices = banks = _changed(module, index, layer)
            try:
                if layer.constants is not None:
                    sites = bank_sites(module)
                    [down] = [name for name in banks if sites[name].part == "down"]
                    matrices = {**banks, down: banks[down].without_biases()}
                _fill(dense, matrices, layer)
                tensors = restored(layout.dense, dense, prefix, layer.modules)
            finally:
                for path in layer.modules:
                    dense.get_submodule(path).to("meta")
            if layer.constants is not None:
                tensors = _substituted(tensors, banks[down], layer.constants)
    assert set(tensors) == set(layer.made), set(tensors) ^ set(layer.made)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{name}: does not fit into {str(tensor.dtype).removeprefix('torch.')}; give "
                "--dtype with a wider range"
            )
    with layout.model.source.slices(layer.copied) as slices:
        return tensors | {name: slices[name][...] for name in layer.copied}


def _changed(module: nn.Module, index: int, layer: LayerLayout) -> dict[str, Bank]:
    """The banks of the layer's modules of terms."""
    sites = bank_sites(module)
    return {
        name: bank
        for name, bank in read_banks(module, index).items()
        if sites[name].module in layer.modules
    }


def _fill(dense: nn.Module, banks: dict[str, Bank], layer: LayerLayout) -> None:
    """Multiplies terms out into the original's modules."""
    for path, dtype in layer.modules.items():
        dense.get_submodule(path).to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        write_banks(dense, banks)


def _substituted(
    tensors: dict[str, torch.Tensor], down: Bank, constants: Constants
) -> dict[str, torch.Tensor]:
    """Constant experts' tensors replaced by their constants."""
    found: dict[str, torch.Tensor] = {}
    dtype = torch.float32
    for name, tensor in tensors.items():
        match = ONE_EXPERT.match(name)
        if match is not None:
            dtype = tensor.dtype
        if match is None or int(match[2]) not in constants.numbers:
            found[name] = tensor
    for number in constants.numbers:
        _, vector = down.materialise(number)
        if vector is None:  # an expert that gives nothing
            vector = torch.zeros(down.shape.out_features)
        found[constants.name(number)] = vector.to(dtype).cpu()
    return found
