"""Statistics on disk by what they are of: collected once, found again by any run that needs them.

A statistic's key hashes everything that its numbers depend on: the model files, the token stream,
what fed the layers, the forward's dtype, device type, attention and experts implementation, the
statistic's version and settings, and the layer.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .needs import Need
from .values import from_tensors, to_tensors

VARIABLE = "MCTK_CACHE"


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

    def path(self, need: Need, layer: int) -> Path:
        """Where a layer's statistic lies or would lie."""
        identity = {"context": self.context, "need": need.identity(), "layer": layer}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.directory / key[:2] / f"{key}.safetensors"

    def has(self, need: Need, layer: int) -> bool:
        """Whether a layer's statistic is there."""
        return self.path(need, layer).exists()

    def put(self, need: Need, layer: int, value: Any) -> None:
        """Stores a layer's statistic."""
        from ..files import write_tensors

        path = self.path(need, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, to_tensors(value), {"need": json.dumps(need.identity())})

    def get(self, need: Need, layer: int) -> Any:
        """Reads a layer's statistic."""
        from safetensors import safe_open

        with safe_open(str(self.path(need, layer)), framework="pt", backend="pread") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return from_tensors(need, tensors)
