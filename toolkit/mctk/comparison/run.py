"""A comparison from its file to comparison.json: finished rows are taken up, the rest is made."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluate.loading import versions
from ..files import write_text
from ..recipe import published_command
from .file import LoadedComparison, RowSpec
from .identity import Inputs, evaluation_identity, find_inputs, row_identity, row_key
from .result import SCHEMA, Comparison, Flag, Original, Row, from_json, save, to_json
from .scores import few_windows
from .store import FILE, Store

if TYPE_CHECKING:
    from ..engine import Reporter
    from ..registry import Registry


@dataclass
class Slot:
    """One row on its way.

    Attributes:
        spec: What is asked.
        identity: Hash of all that its checkpoint depends on.
        key: Its directory's name.
        row: What is known of it: finished, failed or refused; None while it is pending.
    """

    spec: RowSpec
    identity: str = ""
    key: str = ""
    row: Row | None = None


class Session:
    """One call on one comparison.

    Args:
        loaded: The file.
        registry: The plugins.
        store: Its directory, locked.
        cache: Directory of the statistics cache.
    """

    def __init__(
        self,
        loaded: LoadedComparison,
        registry: Registry,
        store: Store,
        cache: str | Path | None,
    ) -> None:
        self.loaded, self.registry, self.store, self.cache = loaded, registry, store, cache
        self.inputs: Inputs = find_inputs(loaded, store.memory, cache)
        if self.inputs.commit is not None:  # what moves on the hub meanwhile moves no row
            loaded.pin(self.inputs.commit)
        self.evaluated = evaluation_identity(loaded, self.inputs)
        self.original: Original | None = store.original(self.evaluated)
        self.slots = [Slot(spec) for spec in loaded.rows]
        for slot in self.slots:
            known = slot.spec.undecided and self.store.memory.get(self._unit_key(slot.spec))
            if known == "bytes":
                slot.spec = self.loaded.in_bytes(slot.spec)
            self.take_up(slot)

    @property
    def pending(self) -> list[Slot]:
        """Rows that are neither finished nor given up."""
        return [slot for slot in self.slots if slot.row is None]

    @property
    def complete(self) -> bool:
        """Whether there is nothing to do."""
        known = self.original is not None and self.store.memory.get("about") is not None
        return known and not self.pending and self.structure is not None

    @property
    def structure(self) -> dict[str, Any] | None:
        """What figures show of the original."""
        return self.store.structure(self.evaluated)

    def decide(self, slot: Slot, in_bytes: bool) -> None:
        """Settles what a row's budget counts, and remembers it."""
        self.store.memory.put(self._unit_key(slot.spec), "bytes" if in_bytes else "parameters")
        if in_bytes:
            slot.spec = self.loaded.in_bytes(slot.spec)
        self.take_up(slot)

    def _unit_key(self, spec: RowSpec) -> str:
        return f"unit {self.inputs.fingerprint} {spec.recipe.fingerprint()}"

    def take_up(self, slot: Slot) -> None:
        """Names a row's directory, and takes up what is finished there."""
        spec = slot.spec
        slot.identity = row_identity(spec, self.inputs)
        slot.key = row_key(spec, len(self.loaded.settings.seeds), slot.identity)
        if spec.undecided and self.store.memory.get(self._unit_key(spec)) is None:
            return
        row = self.store.row(slot.key, slot.identity, self.evaluated)
        if row is not None:  # names may have changed since
            name, label = spec.called(row.budget)
            slot.row = dataclasses.replace(row, name=name, label=label)

    def keep(self, slot: Slot, row: Row) -> None:
        """A row is finished."""
        slot.row = row
        self.store.keep_row(row, slot.identity, self.evaluated)

    def count_seconds(self, seconds: dict[str, float]) -> None:
        """Adds what a call took, by phase, to what earlier calls took."""
        memory = self.store.memory
        known, calls = memory.get("seconds") or {}, memory.get("calls")
        both = {**known, **{name: known.get(name, 0.0) + s for name, s in seconds.items()}}
        memory.put("seconds", {name: round(s, 3) for name, s in both.items()})
        if calls is not None or not known:  # else calls before were not counted
            memory.put("calls", (calls or 0) + 1)

    def result(self) -> Comparison | None:
        """What is known so far; None where not even the original has been measured."""
        about = self.store.memory.get("about")
        if self.original is None or about is None:
            return None
        section = self.loaded.settings.evaluate
        rows = [_warned(slot.row) if slot.row else _pending(slot) for slot in self.slots]
        texts = [text.name for text in section.perplexity] if section else []
        data = {
            **about,
            "schema": SCHEMA,
            "name": self.loaded.name,
            "original": dataclasses.asdict(self.original),
            "budgets": [dataclasses.asdict(budget) for budget in self.loaded.budgets],
            "rows": [],
            "texts": texts,
            "tasks": list(self.original.tasks),
            "protocols": _protocols(self.original, rows),
            "seconds": self.store.memory.get("seconds") or {},
            "calls": self.store.memory.get("calls"),
            "structure": self.structure,
            "versions": _versions(self.original),
            "source": self.loaded.published(),
            "finished": not any(row.status == "pending" for row in rows),
        }
        return dataclasses.replace(from_json(data), rows=rows)


def run_comparison(
    loaded: LoadedComparison,
    registry: Registry,
    *,
    cache: str | Path | None = None,
    reporter: Reporter | None = None,
    command: Sequence[str] | None = None,
    jobs: int | None = None,
    started: float | None = None,
) -> Comparison:
    """Makes what is missing of a comparison and writes comparison.json.

    Args:
        loaded: The file.
        registry: The plugins.
        cache: Directory of the statistics cache.
        reporter: Progress; silent by default.
        command: The command line, for the record.
        jobs: Processes that evaluate; by default as many as cores and memory allow, one on a GPU.
        started: What `time.perf_counter` said when the call began; by default it begins here.

    Returns:
        What was found, rows that failed or were refused among it.

    Raises:
        UserError: Something is wrong with what all rows share: model, text, output.
    """
    started = time.perf_counter() if started is None else started
    store = Store(loaded.output)
    with store.locked():
        session = Session(loaded, registry, store, cache)
        if not session.complete:
            from ..engine import Reporter as Silent
            from .work import work

            made = {
                "command": published_command(shlex.join(command)) if command else None,
                "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            try:
                work(session, reporter or Silent(quiet=True), jobs, made, started)
            finally:
                _save(session)
        found = _save(session)
    assert found is not None  # `work` raises where it cannot even measure the original
    return found


def _pending(slot: Slot) -> Row:
    from .rows import asked_row

    return asked_row(slot.spec, slot.key)


def _warned(row: Row) -> Row:
    """The row, flagged if intervals of its figures come from too few windows."""
    fewest = few_windows(row.texts)
    if fewest is None:
        return row
    text = f"intervals come from {fewest} window{'s' if fewest > 1 else ''} of a text: too few"
    return dataclasses.replace(row, flags=[*row.flags, Flag("few windows", text)])


def _versions(original: Original) -> dict[str, str]:
    """Versions of what took part."""
    return {k: v for k, v in versions().items() if k != "lm_eval" or original.tasks}


def _save(session: Session) -> Comparison | None:
    """Writes comparison.json if it is not there as it would be written."""
    found = session.result()
    if found is None:
        return None
    output = session.loaded.output
    if not session.store.holds(to_json(found)):
        from .publish import publish

        write_text(output / "comparison.yaml", session.loaded.published())
        publish(found, output)
        save(found, output / FILE)  # last: if it is there, so are the others
    return found


def _protocols(original: Original, rows: Sequence[Row]) -> list[str]:
    """Of everything that was measured, each once."""
    found: dict[str, None] = {}
    models: list[Original | Row] = [original, *rows]
    for model in models:
        for text in model.texts.values():
            found[text.protocol] = None
            if text.divergence is not None:
                found[text.divergence.protocol] = None
        for name, task in model.tasks.items():
            found[f"lm-eval {name} v{task.version}, {task.shots}-shot, {task.metric}"] = None
        if model.speed is not None:
            found[model.speed.protocol] = None
    return list(found)
