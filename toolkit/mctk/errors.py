"""Errors that a user can cause and mend: one line that names the file, key or option.

Everything else that is raised is a bug of ours and shows a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user gave is wrong; the command line prints it and exits with 2."""


class CheckpointError(UserError):
    """A model directory is damaged, contradicts itself or is of a kind that we refuse."""


class MethodError(UserError):
    """A method or plugin has raised what no user can mend but by leaving it out: a bug of its own.

    What was raised is its cause.
    """


class RecipeError(UserError):
    """A recipe is wrong at a known place.

    Args:
        message: What is wrong and what to write instead.
        file: The recipe's path, if it came from a file.
        line: Line number from 1, if known.
    """

    def __init__(
        self, message: str, file: str | Path | None = None, line: int | None = None
    ) -> None:
        place = "" if file is None else f"{file}:{line}: " if line else f"{file}: "
        super().__init__(place + message)
        self.file = file
        self.line = line


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the hint that follows an unknown name: its nearest valid one, or all of them.

    >>> nearest("removve", ["remove", "keep"])
    " (did you mean 'remove'?)"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    if not names:
        return ""
    return f" (valid: {', '.join(names)})"


def brief(error: BaseException | str, limit: int = 240) -> str:
    """An error's text on one line: libraries tell on several, and the first alone may say nothing.

    >>> brief("Validation error:  expected int")
    'Validation error: expected int'
    """
    text = " ".join(str(error).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
