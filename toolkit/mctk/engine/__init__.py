"""The engine: a set of runs, from plan to report."""

from .progress import Reporter
from .run import run

__all__ = ["Reporter", "run"]
