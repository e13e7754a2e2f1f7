"""What methods say about their work, for the run's log and report.

A choice that data made (how many subsets were searched, what an iteration attained) is not in the
terms that a method returns. It says so in a line; whoever called the method collects the lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_NOTES: ContextVar[list[str] | None] = ContextVar("mctk_notes", default=None)


def note(text: str) -> None:
    """Says one line about the work at hand; nobody needs to listen.

    Args:
        text: A sentence without its full stop; step, layer and banks are known to who listens.
    """
    notes = _NOTES.get()
    if notes is not None:
        notes.append(text)


@contextlib.contextmanager
def collect() -> Iterator[list[str]]:
    """Gives the list to which notes are added while the context is open."""
    notes: list[str] = []
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)
