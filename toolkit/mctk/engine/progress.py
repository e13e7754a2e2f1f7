"""What a long run says while it works: a bar on a terminal, plain lines elsewhere, always a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..report.tables import duration

SELDOM = 30.0  # seconds between plain lines within one part of a phase


class Reporter:
    """Progress and log of one command.

    Args:
        quiet: Say nothing on the terminal but errors.
        stream: Where to speak; standard error by default, so that tables can be piped.
    """

    def __init__(self, quiet: bool = False, stream: IO[str] | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False)
        self._logs: dict[Path, IO[str]] = {}
        self._phase = ""
        self._total = 0
        self._done = 0
        self._started = 0.0
        self._told = 0.0
        self._bar: Progress | None = None
        self.seconds: dict[str, float] = {}

    def add_log(self, path: Path) -> None:
        """Appends everything said from now on to a file as well."""
        self._logs[path] = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the log files."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def say(self, text: str) -> None:
        """One line, on the terminal and in the log."""
        self.console.print(text, markup=False, soft_wrap=True)
        self._log(text)

    def detail(self, text: str, log: Path) -> None:
        """One line in one log alone; nowhere if that was not added."""
        self._log(text, log)

    def _log(self, text: str, only: Path | None = None) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        for log in [log for path, log in self._logs.items() if only in (None, path)]:
            log.write(f"{stamp} {text}\n")
            log.flush()

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """A stretch of work of `total` steps (layers, mostly); its seconds are kept by name."""
        self._phase, self._total, self._done = name, total, 0
        self._started = self._told = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.console.is_terminal and not self.console.quiet:
                self._bar = stack.enter_context(
                    Progress(
                        TextColumn("{task.description}"),
                        BarColumn(),
                        MofNCompleteColumn(),
                        TimeElapsedColumn(),
                        TextColumn("left"),
                        TimeRemainingColumn(),
                        console=self.console,
                        transient=True,
                    )
                )
                self._bar.add_task(name, total=total)
            try:
                yield
            finally:
                self._bar = None
                elapsed = time.perf_counter() - self._started
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def progress(self, text: str, done: int, total: int) -> None:
        """How far a part of the phase is; on plain lines once in a while, and at its end."""
        if self._bar is not None:
            task = self._bar.task_ids[0]
            named = f"{self._phase} · {text}"
            self._bar.update(task, completed=done, total=total, description=named)
        now = time.perf_counter()
        if done < total and now - self._told < SELDOM:
            return
        self._told = now
        line = f"{self._phase}: {text} {done}/{total}"
        if self._bar is None:
            self.console.print(line, markup=False, soft_wrap=True)
        self._log(line)

    def step(self, text: str) -> None:
        """One step of the phase is done; `text` says which and how it went."""
        self._done += 1
        elapsed = time.perf_counter() - self._started
        left = elapsed / self._done * (self._total - self._done)
        line = f"{self._phase} {self._done}/{self._total} {text}"
        if self._bar is not None:
            task = self._bar.task_ids[0]
            named = f"{self._phase} · {text}"
            self._bar.update(task, completed=self._done, total=self._total, description=named)
        else:
            told = f" ({duration(left)} left)" if self._done < self._total else ""
            self.console.print(line + told, markup=False, soft_wrap=True)
        self._log(line)
