"""What entered the layers of a forward sweep, kept on disk for the sweep that goes back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_tensors
from .passed import Passed, batch_tensors, count_batches, read_batch

SEGMENT = "segment"


class BoundaryStore:
    """What passes layer boundaries, one file each; a file is there whole or not at all.

    Kept in the forward's dtype: a float32 model's rounded to bfloat16 moved squared gradients by 1
    to 8 %. It does not know which tokens they came from: that is for whoever makes the directory.

    Args:
        directory: Where files go; made when the first is written.
        layers: The number of layers L. Boundary L is the last layer's output, always kept.
        every: Keep what enters every so many layers; what lies between is computed again.
        first: The lowest layer that gradients are wanted of; boundaries below its segment are not
            kept.
    """

    def __init__(self, directory: Path, layers: int, every: int = 1, first: int = 0) -> None:
        if every < 1 or not 0 <= first < layers:
            raise ValueError(f"every {every}, first {first}, of {layers} layers")
        self.directory = directory
        self.layers, self.every, self.first = layers, every, first

    def keeps(self, layer: int) -> bool:
        """Whether what enters a layer is to be kept."""
        lowest = self.first - self.first % self.every
        return layer == self.layers or (layer % self.every == 0 and layer >= lowest)

    def put(self, layer: int, passed: list[Passed]) -> None:
        """Keeps what enters a layer, one entry a batch."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(layer), batch_tensors(passed))

    def has(self, layer: int) -> bool:
        """Whether what enters a layer is there."""
        return self._path(layer).exists()

    def get(self, layer: int) -> list[Passed]:
        """What enters a layer, all batches."""
        from safetensors import safe_open

        with safe_open(str(self._path(layer)), framework="pt", backend="pread") as file:
            return [read_batch(file, b) for b in range(count_batches(file))]

    def batch(self, layer: int, b: int) -> Passed:
        """What enters a layer in batch b."""
        from safetensors import safe_open

        with safe_open(str(self._path(layer)), framework="pt", backend="pread") as file:
            return read_batch(file, b)

    def drop(self, layer: int) -> None:
        """Forgets what enters a layer."""
        self._path(layer).unlink(missing_ok=True)

    def complete(self, layer: int) -> bool:
        """Whether everything is there that is to be kept of the boundaries below a layer."""
        return all(self.has(i) for i in range(layer) if self.keeps(i))

    def clear(self) -> None:
        """Removes all files, those of `segment` too, and the directory."""
        if not self.directory.exists():
            return
        if (self.directory / SEGMENT).exists():
            self.segment().clear()
        for pattern in ("layer.*.safetensors", ".layer.*.tmp"):  # a kill leaves the latter
            for path in self.directory.glob(pattern):
                path.unlink()
        self.directory.rmdir()

    def segment(self) -> BoundaryStore:
        """Room for boundaries that are computed again, while their segment is worked on."""
        return BoundaryStore(self.directory / SEGMENT, self.layers)

    def nbytes(self, tokens: int, width: int) -> int:
        """Bytes on disk at the most, with a segment's boundaries computed again.

        Args:
            tokens: Calibration tokens in all.
            width: Bytes of one token's hidden states, and of what passes beside them.
        """
        kept = sum(self.keeps(layer) for layer in range(self.layers + 1))
        return (kept + self.every - 1) * tokens * width

    def _path(self, layer: int) -> Path:
        return self.directory / f"layer.{layer}.safetensors"


class KeptBatches(Sequence[Passed]):
    """What enters a layer, one entry a batch, each read from disk when it is asked for.

    Args:
        store: Where it is kept.
        layer: The layer.
        count: How many batches there are.
    """

    def __init__(self, store: BoundaryStore, layer: int, count: int) -> None:
        self.store, self.layer, self.number = store, layer, count

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.number:
            raise IndexError(index)
        return self.store.batch(self.layer, index)
