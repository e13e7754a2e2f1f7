"""Processes that evaluate rows: each loads a row once, checks it and measures all that is asked.

A process serves many rows, since starting one takes seconds; none of them has computed what it
loads, so it is also the fresh process of the gate. One that dies takes down the row that it was at,
not the others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..errors import UserError, brief
from ..recipe import Evaluate

Outcome = dict[str, Any] | str
"""An evaluation, or why there is none."""


@dataclass(frozen=True)
class Job:
    """One model to be evaluated.

    Attributes:
        name: For messages.
        path: Its directory.
        section: What is measured.
        settings: Device, dtype, whether remote code may run.
        keep: Where to keep the original's logits.
        against: Where they were kept.
        state: Where a gate's probe may lie.
    """

    name: str
    path: Path
    section: Evaluate
    settings: dict[str, Any]
    keep: Path | None = None
    against: Path | None = None
    state: Path | None = None


def work(job: Job) -> Outcome:
    """Evaluates one model, in a worker; "fresh_process_equal": whether the gate looked at it."""
    from ..engine.probe import check_probe
    from ..evaluate import evaluate_model

    checked = False

    def check(model: Any) -> None:
        nonlocal checked
        if job.state is not None:
            checked = check_probe(model, job.state)

    try:
        found = evaluate_model(
            job.path,
            job.section,
            keep=job.keep,
            against=job.against,
            check=check,
            **job.settings,
        )
    except UserError as error:
        return str(error)
    except Exception as error:  # one row's failure is that row's
        return f"{type(error).__name__}: {brief(error)}"
    return {**found, "fresh_process_equal": checked or None}


@contextlib.contextmanager
def _script_left_alone() -> Iterator[None]:
    """Keeps processes that start now from running the caller's script again.

    A spawned process imports the main module of its parent, and a script without a guard by
    `__name__` would begin the comparison anew in each. Nothing here is defined in such a module.
    """
    main: Any = sys.modules["__main__"]
    kept = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
    for name in kept:
        delattr(main, name)
    main.__spec__ = None  # asked for by name
    try:
        yield
    finally:
        del main.__spec__
        vars(main).update(kept)


class Workers:
    """A pool of processes.

    Args:
        count: How many.
        threads: Of torch, each.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count, self._threads = count, threads
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, job: Job) -> Future[Outcome]:
        """Hands a job to the next process that is free."""
        with _script_left_alone():
            try:
                return self._open().submit(work, job)
            except BrokenProcessPool:
                self.close()
                return self._open().submit(work, job)

    def outcomes(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Does the jobs; yields them as they are done.

        Where a process dies, which of the jobs at work was to blame cannot be told: they are done
        again one by one, each in a process of its own.
        """
        waiting = {self.submit(job): job for job in jobs}
        again: list[Job] = []
        for future in as_completed(waiting):
            job = waiting[future]
            try:
                yield job, future.result()
            except BrokenProcessPool:
                again.append(job)
        for job in again:
            self.close()
            try:
                outcome: Outcome = self.submit(job).result()
            except BrokenProcessPool:
                self.close()
                outcome = "the process that evaluated it was killed; out of memory?"
            yield job, outcome

    def close(self) -> None:
        """Ends the processes, at once where they have nothing to do."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _open(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count,
                mp_context=get_context("spawn"),  # a fork of a process with torch threads may hang
                initializer=_start,
                initargs=(self._threads, os.getpid()),
            )
        return self._pool


@contextlib.contextmanager
def workers(count: int, threads: int) -> Iterator[Workers]:
    """A pool that is closed afterwards."""
    pool = Workers(count, threads)
    try:
        yield pool
    finally:
        pool.close()


def _start(threads: int, parent: int) -> None:
    """Begins a worker: quiet, with its share of the cores, gone when its parent is."""
    # Bars of tasks and their data, of several processes at once; read when those are imported.
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    import torch
    from transformers.utils import logging

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    torch.set_num_threads(threads)
    logging.set_verbosity_error()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def share_of_cores(jobs: int) -> int:
    """Threads for each of so many processes: what torch would take here, shared out."""
    import torch

    return max(1, torch.get_num_threads() // jobs)
