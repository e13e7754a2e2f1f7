"""Families checked side by side, each worker a process of its own that may crash."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from .outcome import COLUMNS, Outcome

SPAWN = get_context("spawn")


def _work(answers: Connection, directory: str) -> None:
    """What a worker does: checks the families that it is sent, until it is sent None."""
    os.environ["HF_MODULES_CACHE"] = f"{directory}/modules"  # where remote code is copied to
    import torch

    from .check import FRESH, check_any
    from .native_check import PLAIN

    torch.set_num_threads(1)
    gc.freeze()  # a streamed model collects garbage after each layer: not among what libraries hold
    while (name := answers.recv()) is not None:
        place = Path(directory) / name.replace(" ", "-")
        answers.send(check_any(name, place))
        shutil.rmtree(place, ignore_errors=True)
    FRESH.stop()
    PLAIN.stop()


class _Worker:
    """A process that checks families; started anew after a crash."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.process = None
        self.pipe: Connection | None = None

    def check(self, name: str, seconds: float) -> Outcome:
        """Has a family checked; a crash or too long a time is its outcome."""
        if self.process is None:
            self.pipe, theirs = SPAWN.Pipe()
            self.process = SPAWN.Process(target=_work, args=(theirs, self.directory), daemon=False)
            self.process.start()
            theirs.close()
        assert self.pipe is not None
        said = f"took longer than {seconds / 60:.0f} minutes"
        try:
            self.pipe.send(name)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            said = f"the process that checked it died ({self.process.exitcode})"
        self.stop()
        return Outcome(name, dict.fromkeys(COLUMNS, said))

    def stop(self) -> None:
        """Ends the process: lets it go, or kills it if it is busy."""
        process, self.process = self.process, None
        if process is not None:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            process.join(10)
            process.kill()
            process.join()


def check_all(
    names: Sequence[str],
    jobs: int,
    done: Callable[[Outcome], None],
    seconds: float = 1200,
) -> dict[str, Outcome]:
    """Checks families in so many processes.

    Args:
        names: The families.
        jobs: Processes.
        done: Is called with each outcome as it comes.
        seconds: The longest that a family may take.

    Returns:
        Outcomes by name, in the order given.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    found: dict[str, Outcome] = {}
    lock = threading.Lock()

    def serve() -> None:
        with tempfile.TemporaryDirectory(prefix="mctk-families-") as directory:
            worker = _Worker(directory)
            try:
                while True:
                    try:
                        name = waiting.get_nowait()
                    except queue.Empty:
                        return
                    outcome = worker.check(name, seconds)
                    with lock:
                        found[name] = outcome
                        done(outcome)
            finally:
                worker.stop()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in names}
