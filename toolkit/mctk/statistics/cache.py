"""Statistics on disk by what they are of: collected once, found again by any run that needs them.

A statistic's key hashes everything that its numbers depend on: the model files, the token stream,
what fed the layers, the forward's dtype, device type, attention and experts implementation, the
statistic's version and settings, and the layer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..files import write_tensors
from .needs import Need
from .values import from_tensors, to_tensors

VARIABLE = "MCTK_CACHE"
CHECKSUM = "crc32"
_LOGGER = logging.getLogger(__name__)


def cache_directory(given: str | Path | None = None) -> Path:
    """The cache: `--cache`, else MCTK_CACHE, else mctk's folder in the user's cache directory."""
    if given:
        return Path(given)
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mctk"


class StatisticsCache:
    """One model's and one calibration's statistics.

    Args:
        directory: The cache's directory.
        context: All that the numbers depend on besides need and layer, as JSON.
    """

    def __init__(self, directory: Path, context: dict[str, Any]) -> None:
        self.directory = directory / "statistics"
        self.context = context
        self.hits = 0
        self.misses = 0

    def derived(self, steps: Any) -> StatisticsCache:
        """The cache of what is measured after some steps of a recipe.

        Args:
            steps: What those steps are, as JSON.
        """
        return StatisticsCache(self.directory.parent, {**self.context, "steps": steps})

    def path(self, need: Need, layer: int) -> Path:
        """Where a layer's statistic lies or would lie."""
        identity = {"context": self.context, "need": need.identity(), "layer": layer}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.directory / key[:2] / f"{key}.safetensors"

    def has(self, need: Need, layer: int) -> bool:
        """Whether a layer's statistic is there and whole; one that is cut off is thrown away.

        Only the header is read: contents are checked when they are (`get`).
        """
        path = self.path(need, layer)
        if not path.exists():
            return False
        try:
            with _open(path) as file:
                if CHECKSUM in (file.metadata() or {}):
                    return True
        except (OSError, SafetensorError) as error:
            _LOGGER.warning("%s is damaged and will be collected anew: %s", path, error)
        path.unlink(missing_ok=True)
        return False

    def put(self, need: Need, layer: int, value: Any) -> None:
        """Stores a layer's statistic."""
        path = self.path(need, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {k: t.detach().cpu().contiguous() for k, t in to_tensors(value).items()}
        metadata = {"need": json.dumps(need.identity()), CHECKSUM: checksum(tensors)}
        write_tensors(path, tensors, metadata)

    def get(self, need: Need, layer: int) -> Any:
        """Reads a layer's statistic.

        Raises:
            UserError: The file is damaged; it is thrown away, so that another run collects it anew.
        """
        path = self.path(need, layer)
        try:
            with _open(path) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get(CHECKSUM)
        except FileNotFoundError as error:
            raise UserError(f"{path}: the statistic has gone from the cache; run again") from error
        except (OSError, SafetensorError) as error:
            problem: str | None = str(error)
        else:
            problem = None if checksum(tensors) == expected else "its checksum is wrong"
        if problem:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: the statistic was damaged ({problem}) and has been removed; run the same "
                "command again to collect it anew"
            )
        return from_tensors(need, tensors)


def _open(path: Path) -> Any:
    return safe_open(str(path), framework="pt", backend="pread")


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the tensors' bytes by name: enough against accidents, and quick."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"
