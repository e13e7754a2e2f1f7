"""Files that are there whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dtypes import stored_name

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # bytes; a cache line, and what vector instructions like


def room_for(output: Path) -> tuple[Path, int]:
    """Where a directory that may not exist yet would lie, and the bytes that it can take.

    What it already holds counts as free: a run that goes on writes the same files.
    """
    place = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    held = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    return place, shutil.disk_usage(place).free + held


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name to write under; then the file is made durable and gets its own name.

    A kill leaves the old file or the new; an error leaves the old one and no temporary.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with _beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Writes a safetensors file atomically, tensor by tensor, its data aligned to 64 bytes.

    Args:
        path: The file.
        tensors: What it holds, by name.
        metadata: Strings to store with it.
        read: Gives a tensor when its turn comes, so that they need not all be in memory; those of
            `tensors` are then on the meta device.

    Raises:
        ValueError: What `read` gives has not the dtype or shape that was said.

    The library's own writer aligns to 8. Processors multiply unaligned matrices by other kernels,
    with other last bits: a model mapped into memory from such a file would not give the logits
    that the same numbers gave elsewhere. Wide types come first, so that each tensor starts at a
    multiple of its element.
    """
    import torch

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": stored_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with _beside(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensors[name] if read is None else read(name)
            # The header, with every tensor's place, is written already.
            said, found = (f"{t.dtype} {list(t.shape)}" for t in (tensors[name], tensor))
            if found != said:
                raise ValueError(f"{path}: tensor {name} was to be {said}, and is {found}")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
