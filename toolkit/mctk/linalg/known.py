"""Directions that were found a moment ago: one matrix is often cut at several ranks.

Of a decomposition the eigenvectors cost most, and they do not depend on the rank. While
`remembered` is in force they are kept by what they are of, so that a comparison whose rows cut the
same matrices at several sizes, or store one product in several ways, finds them once. What is found
again has the same bits as what would be computed again.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Directions = tuple[Tensor, Tensor]  # a spectrum [r] and one vector a row [r, n]
_Key = tuple[object, ...]


@dataclass(frozen=True)
class _Entry:
    """What was decomposed, and what came of it."""

    of: tuple[Tensor, ...]
    found: Directions

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.of, *self.found))

    def alone(self) -> _Entry:
        """The same without the larger tensors that some are views of, which would live as long."""
        spectrum, vectors = self.found
        return _Entry(tuple(map(_alone, self.of)), (_alone(spectrum), _alone(vectors)))


class Known:
    """Directions by what they are of; the ones that were not used for longest go first.

    Args:
        limit: Bytes that may be held, of inputs and directions together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()

    def directions(
        self, kind: str, of: tuple[Tensor, ...], compute: Callable[[], Directions]
    ) -> Directions:
        """Returns what is known, or computes and keeps it.

        Args:
            kind: What the tensors mean; other kinds never match.
            of: What the directions follow from. They must not be changed in place afterwards.
            compute: Finds the directions.
        """
        if not self.limit:
            return compute()
        # Sums tell tensors apart cheaply; whether they are the same, their bits tell.
        key = (kind, *((x.shape, x.dtype, x.device, float(x.double().sum())) for x in of))
        entry = self._entries.get(key)
        if entry is not None and all(map(torch.equal, entry.of, of)):
            self._entries.move_to_end(key)
            return entry.found
        entry = _Entry(of, compute())
        if entry.nbytes <= self.limit:
            entry = entry.alone()
            self._drop(key)
            self._entries[key] = entry
            self.held += entry.nbytes
            while self.held > self.limit:
                self._drop(next(iter(self._entries)))
        return entry.found

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held -= entry.nbytes


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that holds nothing but itself."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


_KNOWN: ContextVar[Known | None] = ContextVar("mctk_known_directions", default=None)


@contextlib.contextmanager
def remembered(limit: int) -> Iterator[Known]:
    """Keeps directions that are found in here, until it is left.

    Args:
        limit: Bytes that may be held.
    """
    known = Known(limit)
    token = _KNOWN.set(known)
    try:
        yield known
    finally:
        _KNOWN.reset(token)


def directions(kind: str, of: tuple[Tensor, ...], compute: Callable[[], Directions]) -> Directions:
    """Returns what is remembered, if `remembered` is in force, or what `compute` finds."""
    known = _KNOWN.get()
    return compute() if known is None else known.directions(kind, of, compute)
