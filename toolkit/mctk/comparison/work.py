"""What a comparison's call does where rows are missing: plan, calibrate, compress, evaluate.

All rows of one seed are one set of runs: the model is read once a sweep for all of them. The
original is measured beside that, rows afterwards, in processes of their own.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import experts_per_token
from ..engine import Reporter, run
from ..engine.conclude import (
    evaluation_settings,
    hub_record,
    known_original,
    license_of,
    logits_of,
    original_path,
    write_reports,
)
from ..engine.run import read_calibration
from ..errors import UserError, brief
from ..evaluate import compare
from ..evaluate.loading import free_memory
from ..files import write_json
from ..planning import Plan
from ..report.tables import size
from ..statistics import cache_directory
from .planning import plan_rows
from .result import Row
from .rows import asked_row, finished_row, original_of, speed
from .store import STATE
from .structure import structure
from .workers import Job, Outcome, Workers, share_of_cores, workers

if TYPE_CHECKING:
    from .run import Session, Slot

MOST_JOBS = 8
PROCESS = 1 << 29  # bytes that a process takes before it holds a model
NOTHING: dict[str, Any] = {"perplexity": {}, "divergence": {}, "tasks": {}}


def work(
    session: Session,
    reporter: Reporter,
    jobs: int | None,
    made: dict[str, Any],
    started: float,
) -> None:
    """Makes what is missing; rows that fail say why.

    Args:
        session: The comparison.
        reporter: Progress.
        jobs: Processes that evaluate; None: as many as there is room for.
        made: The command line and the time, for the record.
        started: What `time.perf_counter` said when the call began.

    Raises:
        UserError: Something that all rows share is wrong.
    """
    try:
        with reporter.phase("plan", len(session.pending)):
            plan = plan_rows(session, reporter)
        # Memory is collected after every layer of every row: what libraries and plans hold until
        # the end need not be looked through each time.
        gc.freeze()
        _Work(session, reporter, plan, jobs, made).run()
    finally:
        gc.unfreeze()
        seconds = {**reporter.seconds, "total": time.perf_counter() - started}
        session.count_seconds(seconds)


class _Work:
    """Everything after planning; see `work`."""

    def __init__(
        self,
        session: Session,
        reporter: Reporter,
        plan: Plan,
        jobs: int | None,
        made: dict[str, Any],
    ) -> None:
        self.session, self.reporter, self.plan, self.made = session, reporter, plan, made
        self.directory = cache_directory(session.cache)
        section = session.loaded.settings.evaluate
        self.speed = section.speed if section is not None else None
        # Speed is measured apart, when nothing else is at work.
        self.section = section.model_copy(update={"speed": None}) if section else None
        self.jobs = jobs or self._room()
        self.metrics: dict[str, dict[str, Any]] = {}  # by row, of those that are compressed

    def run(self) -> None:
        """Compresses, evaluates and looks at the original."""
        ready = self.session.pending
        self._tell_disk(ready)
        with workers(self.jobs, share_of_cores(self.jobs)) as pool:
            waiting = self._begin_original(pool)
            if self.jobs == 1:  # one thing at a time
                waiting = self._original(waiting)
            for seed in self.session.loaded.settings.seeds:
                self._compress([slot for slot in ready if slot.spec.seed == seed])
            original = self._original(waiting)
            self._evaluate([slot for slot in ready if slot.key in self.metrics], original, pool)
        if self.speed is not None:
            self._measure_speed()
        windows = read_calibration(self.plan)
        found = structure(
            self.plan, windows, self.directory, self.session.inputs.fingerprint, self.reporter
        )
        self.session.store.keep_structure(found, self.session.evaluated)

    def _room(self) -> int:
        """How many processes there are cores and memory for; on a GPU one."""
        device = str(self.plan.model.device)
        if device != "cpu":
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        weights = self.plan.original.parameters * self.plan.model.dtype.itemsize
        room = free_memory(device) // (2 * (weights + PROCESS))
        return max(1, min(cores or 1, MOST_JOBS, room))

    def _tell_disk(self, slots: Sequence[Slot]) -> None:
        """Warns where the rows will hardly find room."""
        original = self.plan.original
        experts = original.expert_parameters / original.parameters
        need = 0.0
        for slot in slots:
            budget = slot.spec.budget
            part = 1.0 if budget is None or budget.of == "model" else experts
            need += original.bytes * (1 - (budget.remove if budget else 0.0) * part)
        free = shutil.disk_usage(self.session.store.output).free
        if need > free:
            self.reporter.say(
                f"warning: the rows may take {size(need)}, and {size(free)} are free in "
                f"{self.session.store.output}"
            )

    # The original

    def _begin_original(self, pool: Workers) -> Future[Outcome] | dict[str, Any]:
        """The original's evaluation: known, or begun beside the calibration."""
        if self.section is None:
            return NOTHING
        known = self._known_original()
        if (found := known_original(known, self.section)) is not None:
            return found
        known.parent.mkdir(parents=True, exist_ok=True)
        self.reporter.say("the original is evaluated in a process of its own")
        keep = logits_of(known) if self.section.divergence is not None else None
        job = Job("original", self.plan.source.path, self.section, self._settings(), keep=keep)
        return pool.submit(job)

    def _original(self, waiting: Future[Outcome] | dict[str, Any]) -> dict[str, Any]:
        """The original's evaluation, once it is there.

        Raises:
            UserError: It cannot be evaluated; then nothing else could be.
        """
        if isinstance(waiting, Future):
            try:
                outcome = waiting.result()
            except BrokenProcessPool:
                outcome = "the process was killed; out of memory?"
            if isinstance(outcome, str):
                raise UserError(f"the original cannot be evaluated: {outcome}")
            write_json(self._known_original(), outcome)
            waiting = outcome
        session = self.session
        original = original_of(self.plan.original.as_dict(), waiting)
        if session.original is not None and session.original.speed is not None:
            original = dataclasses.replace(original, speed=session.original.speed)
        session.original = original
        session.store.keep_original(original, session.evaluated)
        self._tell_about()
        return waiting

    def _known_original(self) -> Path:
        assert self.section is not None
        fingerprint = self.session.inputs.fingerprint
        return original_path(self.plan, self.section, self.directory, fingerprint)

    def _settings(self) -> dict[str, Any]:
        return evaluation_settings(self.plan)

    def _tell_about(self) -> None:
        """Keeps what the comparison says of model and calibration."""
        session, plan, recipe = self.session, self.plan, self.plan.recipe
        known = session.store.memory.get("about") or {}
        some = next(iter(self.metrics.values()), {})
        experts = [s.shape.members for sites in plan.sites for s in sites.values()]
        calibrations: list[dict[str, Any]] = [
            {
                "seed": seed,
                "digest": session.inputs.calibrations[seed],
                "sequences": recipe.calibration.sequences,
                "length": recipe.calibration.length,
                "sources": (some.get("calibration") or {}).get("sources")
                or next((c["sources"] for c in known.get("calibrations", [])), []),
            }
            for seed in session.loaded.settings.seeds
            if recipe.calibration is not None
        ]
        about = {
            "model": {
                "name": recipe.model_name,
                "path": str(plan.source.path),
                **hub_record(plan.source),
                "model_type": plan.model.config.model_type,
                "layers": len(plan.model.layers),
                "experts": max(experts) if max(experts, default=1) > 1 else None,
                "experts_per_token": experts_per_token(plan.model.config),
                "fingerprint": session.inputs.fingerprint,
                "license": license_of(plan.source.path),
            },
            **self._settings(),
            "calibrations": calibrations,
            "statistics": some.get("statistics") or known.get("statistics"),
            **self.made,
        }
        about.pop("trust_remote_code")
        session.store.memory.put("about", about)

    # Rows

    def _compress(self, slots: Sequence[Slot]) -> None:
        """Runs the rows of one seed as a set; their evaluation comes later."""
        if not slots:
            return
        session = self.session
        recipes = [
            slot.spec.recipe.model_copy(
                update={"output": session.store.directory(slot.key), "evaluate": None}
            )
            for slot in slots
        ]
        outcomes = run(
            recipes,
            session.registry,
            cache=session.cache,
            reporter=self.reporter,
            keep_going=True,
            fresh_process=self.section is None,
        )
        for slot, outcome in zip(slots, outcomes, strict=True):
            if isinstance(outcome, Exception):
                told = isinstance(outcome, UserError)
                reason = str(outcome) if told else f"{type(outcome).__name__}: {brief(outcome)}"
                slot.row = asked_row(slot.spec, slot.key, "failed", reason)
            else:
                self.metrics[slot.key] = outcome

    def _evaluate(self, slots: Sequence[Slot], original: dict[str, Any], pool: Workers) -> None:
        """Evaluates compressed rows, several at a time, and finishes them."""
        self._tell_about()
        if self.section is None:
            for slot in slots:
                self._finish(slot, original, NOTHING)
            return
        against = logits_of(self._known_original()) if self.section.divergence else None
        by_key = {slot.key: slot for slot in slots}
        jobs = [
            Job(
                key,
                self.session.store.directory(key),
                self.section,
                self._settings(),
                against=against,
                state=self.session.store.directory(key) / STATE,
            )
            for key in by_key
        ]
        with self.reporter.phase("evaluate", len(jobs)):
            for job, outcome in pool.outcomes(jobs):
                slot = by_key[job.name]
                if isinstance(outcome, str):
                    slot.row = asked_row(slot.spec, slot.key, "failed", outcome)
                    self.reporter.step(f"{slot.key} failed: {outcome}")
                    continue
                self._finish(slot, original, outcome)
                self.reporter.step(f"{slot.key}{_in_words(slot.row)}")

    def _finish(self, slot: Slot, original: dict[str, Any], found: dict[str, Any]) -> None:
        """Writes a row's figures into its own report and into the comparison."""
        store = self.session.store
        metrics = self.metrics[slot.key]
        directory = store.directory(slot.key)
        if self.section is not None:
            passed = found.get("fresh_process_equal")
            if metrics["gate"] and passed:
                metrics["gate"]["fresh_process_equal"] = passed
            paired = compare(original, found, slot.spec.seed)
            metrics["evaluation"] = {"original": original, "compressed": found, "paired": paired}
            write_reports(directory, metrics)
        manifest = store.manifest(slot.key)
        row = finished_row(slot.spec, slot.key, directory, metrics, manifest, original, found)
        self.session.keep(slot, row)

    def _measure_speed(self) -> None:
        """Measures tokens per second, one model after the other."""
        session, section = self.session, self.session.loaded.settings.evaluate
        assert section is not None and session.original is not None
        shorter = [text.model_copy(update={"windows": 1}) for text in section.perplexity[:1]]
        quick = section.model_copy(
            update={"perplexity": shorter, "divergence": None, "tasks": [], "limit": None}
        )
        jobs, slots = [], {}
        if session.original.speed is None:
            jobs.append(Job("original", self.plan.source.path, quick, self._settings()))
        for slot in session.slots:
            if slot.row is not None and slot.row.status == "ok" and slot.row.speed is None:
                slots[slot.key] = slot
                place = session.store.directory(slot.key)
                jobs.append(Job(slot.key, place, quick, self._settings()))
        with workers(1, share_of_cores(1)) as pool, self.reporter.phase("speed", len(jobs)):
            for job, outcome in pool.outcomes(jobs):
                if isinstance(outcome, str):
                    self.reporter.step(f"{job.name}: no speed: {outcome}")
                    continue
                measured = speed(outcome)
                if job.name in slots:
                    row = slots[job.name].row
                    assert row is not None
                    session.keep(slots[job.name], dataclasses.replace(row, speed=measured))
                else:
                    session.original = dataclasses.replace(session.original, speed=measured)
                    session.store.keep_original(session.original, session.evaluated)
                self.reporter.step(job.name)


def _in_words(row: Row | None) -> str:
    """A row's perplexity against the original's, for the log."""
    if row is None or row.overall is None or row.overall.perplexity is None:
        return ""
    change = row.overall.change
    told = f" ({change.value:+.4f} log)" if change else ""
    return f": perplexity {row.overall.perplexity:.2f}{told}"
