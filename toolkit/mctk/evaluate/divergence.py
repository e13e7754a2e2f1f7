"""How far a model's next-token distributions are from another's: KL divergence and agreement.

Both are taken over whole vocabularies and over the positions whose next token perplexity predicts,
while perplexity is measured. The other model's logits lie on disk, in the dtype in which it gave
them; a window of them is in memory at a time.
Letters: N windows, B windows of a batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bootstrap import bootstrap_mean

if TYPE_CHECKING:
    import torch

PROTOCOL = "next_token_kl"
VERSION = 1  # raised whenever the figures change
_ROWS = 1 << 18  # float32 logits that are looked at together: 1 MiB, so that they stay in the cache


def window_divergence(
    logits: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference ‖ logits) and agreement, summed over each window's positions but the last.

    With Z the logarithm of the sum of exponentials, r the reference's logits and q the others, it
    is ``Σ_v softmax(r)_v (r_v - q_v) - (Z_r - Z_q)``; float32, the sums over positions float64.

    Args:
        logits: [B, T, V], of any floating type.
        reference: The same of the other model.

    Returns:
        KL in nats, float64 [B], and positions at which both have their largest logit at the same
        token (of equal ones the first), int64 [B]; on the CPU.
    """
    import torch

    batch, length, vocabulary = logits.shape
    rows = max(1, _ROWS // vocabulary)
    divergence = torch.zeros(batch, dtype=torch.float64)
    same = torch.zeros(batch, dtype=torch.int64)
    for window in range(batch):
        for first in range(0, length - 1, rows):
            last = min(first + rows, length - 1)
            q = logits[window, first:last].float()
            r = reference[window, first:last].to(logits.device).float()
            z = torch.logsumexp(r, dim=-1, keepdim=True)  # [rows, 1]
            moved = torch.linalg.vecdot(torch.exp(r - z), r - q)
            kl = moved - (z[:, 0] - torch.logsumexp(q, dim=-1))
            divergence[window] += kl.double().sum().cpu()
            same[window] += (q.argmax(-1) == r.argmax(-1)).sum().cpu()
    return divergence, same


@dataclass(frozen=True)
class Divergence:
    """One model's divergence from another on one text.

    Attributes:
        length: T, of which T - 1 positions are compared.
        window_kl: KL in nats, summed over each window's positions, [N].
        window_same: Positions at which both agree, [N].
    """

    length: int
    window_kl: tuple[float, ...]
    window_same: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Compared positions."""
        return len(self.window_kl) * (self.length - 1)

    @property
    def protocol(self) -> str:
        """Name, version and parameters of what was measured."""
        return (
            f"{PROTOCOL}/v{VERSION} windows={len(self.window_kl)} window={self.length} "
            f"direction=original||compressed"
        )

    def to_json(self) -> dict[str, Any]:
        """What metrics.json keeps: means a position, with their 95 % intervals over windows."""
        return {
            "protocol": self.protocol,
            "tokens": self.tokens,
            "kl": self._interval(self.window_kl),
            "agreement": self._interval(self.window_same),
            "window_kl": [value if math.isfinite(value) else None for value in self.window_kl],
            "window_same": list(self.window_same),
        }

    def _interval(self, sums: tuple[float, ...] | tuple[int, ...]) -> dict[str, float] | None:
        if not all(map(math.isfinite, sums)):
            return None
        value, low, high = bootstrap_mean([(sums, self.length - 1)])
        return {"value": value, "low": low, "high": high}


def shared_out(
    windows: Mapping[str, int], length: Mapping[str, int], tokens: int
) -> dict[str, int]:
    """How many windows of each text are compared: the first ones, of all texts alike.

    Args:
        windows: How many each text has.
        length: Tokens of each text's windows.
        tokens: How many positions may be compared in all; a window of each text is, in any case.
    """
    each = tokens // max(1, len(windows))
    return {name: max(1, min(count, each // length[name])) for name, count in windows.items()}


class LogitStore:
    """Logits on disk, for each text those of its first windows.

    Args:
        directory: Where they lie; whole or not there.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._header: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether it has been written to the end."""
        return (self.directory / "header.json").is_file()

    def header(self) -> dict[str, Any]:
        """By text: file, shape, dtype, digest of the text's tokens."""
        if self._header is None:
            self._header = json.loads((self.directory / "header.json").read_text(encoding="utf-8"))
        return self._header

    def logits(self, name: str, digest: str) -> torch.Tensor | None:
        """A text's logits [n, T, V], mapped from disk; None if it has not those of these tokens."""
        import torch

        entry = self.header().get(name)
        if entry is None or entry["digest"] != digest:
            return None
        return torch.from_file(
            str(self.directory / entry["file"]),
            shared=False,
            size=math.prod(entry["shape"]),
            dtype=getattr(torch, entry["dtype"]),
        ).view(entry["shape"])


@dataclass
class Writer:
    """Writes a `LogitStore`.

    Args:
        directory: Where it will lie, once `finish` is called.
    """

    directory: Path
    _entries: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._place = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.tmp")
        self._place.mkdir(parents=True)

    def add(self, name: str, digest: str, windows: int, first: int, logits: torch.Tensor) -> None:
        """Takes up logits of some windows.

        Args:
            name: The text.
            digest: Of all its tokens.
            windows: How many of its windows are kept.
            first: Number of the first of these.
            logits: [B, T, V].
        """
        import torch

        shape = [windows, *logits.shape[1:]]
        file = f"{list(self._entries).index(name) if name in self._entries else len(self._entries)}"
        self._entries[name] = {
            "file": file,
            "shape": shape,
            "dtype": str(logits.dtype).removeprefix("torch."),
            "digest": digest,
        }
        path = self._place / file
        flat = logits.detach().cpu().contiguous().view(torch.uint8).numpy()
        with path.open("r+b" if path.exists() else "w+b") as stream:
            stream.seek(first * flat[0].nbytes)
            stream.write(memoryview(flat).cast("B"))

    def finish(self) -> None:
        """Gives the store its name."""
        header = self._place / "header.json"
        header.write_text(json.dumps(self._entries, indent=2) + "\n", encoding="utf-8")
        if self.directory.exists():
            shutil.rmtree(self.directory)
        os.replace(self._place, self.directory)

    def discard(self) -> None:
        """Removes what was written, if it is not finished."""
        shutil.rmtree(self._place, ignore_errors=True)


class Watcher:
    """Sees the logits of one text as perplexity is measured: keeps them, or compares them.

    Args:
        name: The text.
        digest: Of its tokens.
        windows: How many of its windows count, from the first.
        length: Tokens of a window.
        writer: Where to keep them; None to compare.
        reference: What to compare with, [≥ windows, T, V].
    """

    def __init__(
        self,
        name: str,
        digest: str,
        windows: int,
        length: int,
        writer: Writer | None = None,
        reference: torch.Tensor | None = None,
    ) -> None:
        self.name, self.digest, self.windows, self.length = name, digest, windows, length
        self._writer, self._reference = writer, reference
        self._kl: list[float] = []
        self._same: list[int] = []

    def see(self, first: int, logits: torch.Tensor) -> None:
        """Takes the logits [B, T, V] of the windows from number `first` on, in order."""
        logits = logits[: max(0, self.windows - first)]
        if not len(logits):
            return
        if self._writer is not None:
            self._writer.add(self.name, self.digest, self.windows, first, logits)
        if self._reference is not None:
            kl, same = window_divergence(logits, self._reference[first : first + len(logits)])
            self._kl += kl.tolist()
            self._same += same.tolist()

    def result(self) -> Divergence | None:
        """What was found, if something was compared."""
        if self._reference is None:
            return None
        return Divergence(self.length, tuple(self._kl), tuple(self._same))


def watched(
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    watchers: list[tuple[int, Watcher]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Passes ids and logits on, and shows each watcher those of its text.

    Args:
        batches: Pairs of ids [B, T] and logits [B, T, V], in order.
        watchers: Each with the number of its text's first window, in order.
    """
    at = 0
    for ids, logits in batches:
        for number, (start, watcher) in enumerate(watchers):
            end = watchers[number + 1][0] if number + 1 < len(watchers) else math.inf
            low, high = max(at, start), min(at + len(ids), end)
            if low < high:
                watcher.see(int(low - start), logits[int(low - at) : int(high - at)])
        yield ids, logits
        at += len(ids)
