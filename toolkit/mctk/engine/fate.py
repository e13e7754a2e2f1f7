"""What becomes of a run of a set: where one fails, the others may go on without it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..errors import UserError, brief

_LOGGER = logging.getLogger(__name__)


@dataclass
class Fate:
    """Whether a run has failed, and whether that ends its set.

    Attributes:
        name: The run, for messages.
        say: Where a failure is told.
        keep_going: Whether the set's other runs go on; a failure is raised at once otherwise.
        error: What ended the run; None while nothing has.
    """

    name: str
    say: Callable[[str], None]
    keep_going: bool = False
    error: Exception | None = None

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """What fails in here is this run's own failure."""
        try:
            yield
        except Exception as error:  # a stranger's method may raise anything
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends the run with the exception that is being handled."""
        if not self.keep_going:
            raise error
        if self.error is not None:
            return
        self.error = error
        if isinstance(error, UserError):
            self.say(f"{self.name} failed: {error}")
        else:
            self.say(f"{self.name} failed: {type(error).__name__}: {brief(error)}")
            _LOGGER.debug("%s", self.name, exc_info=error)


class Fated(Protocol):
    """Whatever belongs to one run."""

    @property
    def fate(self) -> Fate:
        """Its run's."""


F = TypeVar("F", bound=Fated)


def alive(runs: Sequence[F]) -> list[F]:
    """Those that have not failed."""
    return [run for run in runs if run.fate.error is None]


def together(runs: Sequence[F], work: Callable[[list[F]], int]) -> int:
    """Does work for all runs at once; where that fails and the set goes on, for each by itself.

    Args:
        runs: The runs; those that have failed are left out.
        work: Is called with all runs, or with one; what it finished before it failed, it must find
            again. Returns a number of sweeps.

    Returns:
        The sum of what `work` returned.
    """
    left = alive(runs)
    if not left:
        return 0
    try:
        return work(left)
    except Exception as error:
        if len(left) == 1 or not left[0].fate.keep_going:
            left[0].fate.fail(error)
            return 0
    total = 0
    for run in left:
        with run.fate.own():
            total += work([run])
    return total
