"""A model directory as a source of weights: headers first, tensors on demand.

Nothing here keeps a weight file open or mapped: a layer's tensors are opened, read and closed, so
that the pages of one layer are gone before the next is read. Whatever is wrong with the directory
is found from config.json, the index and the headers alone, before any weight is read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import DTYPE_BYTES
from ..errors import CheckpointError
from .quantised import LazyWeight, Quantised, find_quantised, unquantised

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library itself refuses beyond
SETTLED = 2_000_000_000  # nanoseconds; more than any file system's clock tick
# Of whose elements each is a parameter: scales (F8_E8M0) are none.
FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Origin:
    """Where on the hub a model directory comes from.

    Attributes:
        name: owner/name.
        revision: The branch, tag or commit that was asked for; None for the default branch.
        commit: What that was when the model was opened.
    """

    name: str
    revision: str | None
    commit: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads one safetensors header and checks it against the file's size.

    Raises:
        CheckpointError: The file is no safetensors file, or is shorter or longer than its header
            says; names the file and the first tensor that is not whole.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else HEADER_LIMIT + 1
            if length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut within its header")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
    tensors: dict[str, TensorInfo] = {}
    end = 0
    entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    try:
        for name, entry in sorted(entries, key=lambda item: tuple(item[1]["data_offsets"])):
            info = TensorInfo(name, path.name, entry["dtype"], tuple(entry["shape"]))
            first, last = entry["data_offsets"]
            if info.dtype not in DTYPE_BYTES:
                raise CheckpointError(f"{path}: tensor {name} has unknown type {info.dtype}")
            if not all(isinstance(size, int) and size >= 0 for size in info.shape):
                raise CheckpointError(f"{path}: tensor {name}: {entry['shape']} is no shape")
            if first != end or last - first != info.nbytes:
                raise CheckpointError(f"{path}: tensor {name}: offsets contradict its shape")
            if 8 + length + last > size:
                raise CheckpointError(f"{path}: truncated: tensor {name} is not whole")
            tensors[name] = info
            end = last
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header: {error!r}") from error
    if 8 + length + end != size:
        raise CheckpointError(f"{path}: {size - 8 - length - end} bytes that no tensor owns")
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """The index's map tensor → file; whether the files are there is not looked at.

    Raises:
        CheckpointError: It is malformed, or names what is no weight file beside it.
    """
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / INDEX}: malformed index: {error!r}") from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / INDEX}: malformed index: weight_map is no JSON object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{path / INDEX}: tensor {name} lies in {file!r}, outside the model directory"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX}: {file} is no safetensors file")
    return weight_map


def _weight_files(path: Path) -> dict[str, str] | None:
    """The index's map tensor → file, or None for a single file; refuses all else.

    Where a directory holds both, the single file counts: so it does for transformers.
    """
    if (path / SINGLE).exists():
        return None
    if (path / INDEX).exists():
        weight_map = read_index(path)
        for name, file in weight_map.items():
            if not (path / file).is_file():
                raise CheckpointError(
                    f"{path / file}: the file is missing; the index has tensor {name} in it"
                )
        return weight_map
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path}: has weights only as pickle ({pickles[0]}), which can run code when read; "
            "convert them to safetensors first"
        )
    raise CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}")


class Source:
    """A model directory: its config.json and the headers of its weight files.

    Weights that are stored in FP8 or MXFP4 appear as the tensors that they stand for (`quantised`),
    and `config` without a word of it.

    Args:
        path: The directory.
        headers: File → tensors, where the headers come from elsewhere (the hub) and the directory
            holds no weights: good for planning, not for reading.
        origin: Where on the hub it comes from; None for a directory of the user's.

    Raises:
        CheckpointError: Anything missing, damaged, truncated or pointing outside the directory.
    """

    def __init__(
        self,
        path: str | Path,
        headers: dict[str, dict[str, TensorInfo]] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.path = Path(path)
        self.origin = origin
        if not (self.path / "config.json").is_file():
            raise CheckpointError(f"{self.path}: no config.json; is it a model directory?")
        try:
            self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error
        if not isinstance(self.config, dict):
            raise CheckpointError(f"{self.path / 'config.json'}: is no JSON object")
        weight_map = None if headers is not None else _weight_files(self.path)
        if headers is not None:
            names = sorted(headers)
        else:
            names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        # As for transformers, what a file holds counts, not only what the index says it holds.
        self.tensors: dict[str, TensorInfo] = {}
        for name in names:
            found = headers[name] if headers is not None else read_header(self.path / name)
            for tensor, info in found.items():
                if tensor in self.tensors:
                    raise CheckpointError(
                        f"{self.path / name}: tensor {tensor} is in {self.tensors[tensor].file} too"
                    )
                self.tensors[tensor] = info
        for tensor, file in (weight_map or {}).items():
            if tensor not in self.tensors or self.tensors[tensor].file != file:
                raise CheckpointError(
                    f"{self.path / file}: tensor {tensor} is missing; the index names it"
                )
        self.files = names
        self.stored = self.tensors
        self.quantised: Quantised | None = find_quantised(self.path, self.config, self.stored)
        if self.quantised is not None:
            self._show_unquantised(self.quantised)

    def _show_unquantised(self, quantised: Quantised) -> None:
        """Puts the tensors that quantised weights stand for in the place of the stored ones."""
        instead = {packed.values: packed.info for packed in quantised.packed.values()}
        hidden = {part for packed in quantised.packed.values() for part in packed.parts}
        self.tensors = {}
        for stored, info in self.stored.items():
            if stored in instead:
                self.tensors[instead[stored].name] = instead[stored]
            elif stored not in hidden:
                self.tensors[stored] = info
        self.config = unquantised(self.config, quantised.dtype)

    @property
    def commit(self) -> str | None:
        """The commit of a hub model; None for a directory of the user's."""
        return None if self.origin is None else self.origin.commit

    def pretended(self, tensors: dict[str, TensorInfo], config: dict[str, Any]) -> Source:
        """The same directory as if it held these tensors: to map names, not to read."""
        found = copy.copy(self)
        found.tensors = found.stored = tensors
        found.config, found.quantised = config, None
        return found

    @property
    def nbytes(self) -> int:
        """Payload bytes of all tensors, as they are stored."""
        return sum(info.nbytes for info in self.stored.values())

    def stored_bytes(self, name: str) -> int:
        """Payload bytes that a tensor takes in the files, scales included."""
        packed = self.quantised.packed.get(name) if self.quantised is not None else None
        if packed is None:
            return self.tensors[name].nbytes
        return sum(self.stored[part].nbytes for part in packed.parts)

    @contextlib.contextmanager
    def slices(
        self, names: Iterable[str], device: str | torch.device | None = None
    ) -> Iterator[dict[str, Any]]:
        """Lazily read tensors: `value[...]` reads one; the files close with the context.

        Reads by `pread`, not by a memory map: mapped pages would count as ours until closed, and
        a layer's would add up to twice its size.

        Args:
            names: The tensors.
            device: Where quantised weights are dequantised; by default on the CPU.

        Raises:
            CheckpointError: A file has changed or gone since its header was read.
        """
        wanted = list(names)
        packed = {} if self.quantised is None else self.quantised.packed
        stored = [name for name in wanted if name not in packed]
        for name in wanted:
            if name in packed:
                stored += [packed[name].values, packed[name].scales]
        with self._stored_slices(stored) as found:
            yield {
                name: LazyWeight(packed[name], found, device) if name in packed else found[name]
                for name in wanted
            }

    @contextlib.contextmanager
    def _stored_slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Lazily read tensors as they are stored; see `slices`."""
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.stored[name].file, []).append(name)
        with contextlib.ExitStack() as stack:
            found: dict[str, Any] = {}
            for file, members in by_file.items():
                try:
                    handle = stack.enter_context(
                        safe_open(str(self.path / file), framework="pt", backend="pread")
                    )
                    found.update({name: handle.get_slice(name) for name in members})
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(
                        f"{self.path / file}: cannot be read any more: {error}"
                    ) from error
            yield found

    def fingerprint(self, cache: Path) -> str:
        """SHA-256 over config.json, the model's own code and the contents of all weight files.

        Hashing a large model takes a minute or so, once: the result is kept under `cache` by the
        files' real paths, sizes and times of modification and change.

        Args:
            cache: The cache's directory.
        """
        stamps = []
        newest = 0
        for file in self.files:
            real = Path(os.path.realpath(self.path / file))
            stat = real.stat()
            stamps.append([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
            newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        config = (self.path / "config.json").read_bytes()
        for code in sorted(self.path.glob("*.py")):
            config += code.name.encode() + code.read_bytes()
        key = hashlib.sha256(json.dumps(stamps).encode() + config).hexdigest()
        record = cache / "fingerprints" / key
        if record.exists():
            return record.read_text()
        total = hashlib.sha256(config)
        for file in self.files:
            with (self.path / file).open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        # Files written a moment ago may be written again without their times moving: not recorded.
        if time.time_ns() - newest > SETTLED:
            from ..files import write_text

            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, total.hexdigest())
        return total.hexdigest()
