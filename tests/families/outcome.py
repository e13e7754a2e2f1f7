"""What became of a family, in the words of docs/families.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from mctk.errors import UserError

WORKS = "works"
COLUMNS = {
    "inspect": "inspect, plan",
    "banks": "banks",
    "streamed": "streamed",
    "statistics": "statistics",
    "d2moe": "D²-MoE",
    "svd_llm": "SVD-LLM",
    "reap": "REAP",
    "native": "native result",
    "fresh": "fresh load",
    "again": "save again",
}
"""What is tried, and the heading of its column."""


@dataclass
class Outcome:
    """What became of a family.

    Attributes:
        family: Its model type.
        items: Key of `COLUMNS` → "works", or the exact reason.
        remark: What else there is to say.
        refused: Whether it is no causal language model, and mctk says so.
    """

    family: str
    items: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    refused: bool = False

    @property
    def works(self) -> bool:
        """Whether everything does."""
        return not self.failures()

    def failures(self) -> dict[str, str]:
        """What does not work, and why."""
        return {key: said for key, said in self.items.items() if said != WORKS}

    def reasons(self) -> dict[str, list[str]]:
        """Why something does not work, and which columns that holds for."""
        found: dict[str, list[str]] = {}
        for key, said in self.failures().items():
            found.setdefault(said, []).append(key)
        return found

    @contextlib.contextmanager
    def item(self, *keys: str) -> Iterator[None]:
        """Tries what these columns stand for: they say what comes of it."""
        try:
            yield
        except UserError as error:
            self.items |= dict.fromkeys(keys, str(error))
        except Exception as error:  # anything may go wrong in somebody's modelling code
            lines = str(error).strip().splitlines() or [""]
            self.items |= dict.fromkeys(keys, f"{type(error).__name__}: {lines[0]}")
        else:
            for key in keys:
                self.items.setdefault(key, WORKS)
