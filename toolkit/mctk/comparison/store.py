"""A comparison's directory: its lock, its rows' results, and what calls remember for each other.

    comparison.json .md .csv .tex .html    what was found
    comparison.yaml                        the file, with the command line's changes
    rows/<name>-<share>-<hash>/            a run each: a model directory with its own report
    .mctk/                                 lock, memory, the original's figures

A row's directory bears a hash of all that its checkpoint depends on, so that changed rows get new
directories and finished ones are found again, also after a change is taken back.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from ..files import write_json
from .identity import Memory
from .result import SCHEMA, Original, Row

STATE, FILE = ".mctk", "comparison.json"
ROW, ORIGINAL, STRUCTURE = "row.json", "original.json", "structure.json"
FORMS = (".md", ".csv", ".tex", ".html")
_ROWS, _ORIGINALS = TypeAdapter(Row), TypeAdapter(Original)


class Store:
    """What lies in a comparison's directory.

    Args:
        output: The directory.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.state = output, output / STATE
        self.memory = Memory(self.state / "memory.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Takes the directory, which is made if it does not exist.

        Raises:
            UserError: It holds something else, or another comparison is at work in it.
        """
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output: {self.output} is a file, not a directory")
        if self.output.is_dir() and any(self.output.iterdir()):
            run = (self.state / "manifest.json").exists()
            if run or not self.state.is_dir():
                what = "a run, not a comparison" if run else "no comparison of mctk"
                raise UserError(
                    f"output: {self.output} is not empty and holds {what}; choose another one"
                )
        self.state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.state / "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"output: another comparison is at work in {self.output}") from None
        try:
            yield
        finally:
            lock.release()

    def directory(self, key: str) -> Path:
        """A row's directory."""
        return self.output / "rows" / key

    def row(self, key: str, identity: str, evaluated: str) -> Row | None:
        """A finished row, if its checkpoint and its figures are what they would be now."""
        found = _read(self.directory(key) / ROW)
        if found is None or found.get("identity") != [SCHEMA, identity, evaluated]:
            return None
        try:
            return _ROWS.validate_python(found["row"])
        except ValidationError:
            return None

    def keep_row(self, row: Row, identity: str, evaluated: str) -> None:
        """Keeps a finished row."""
        data = json.loads(_ROWS.dump_json(row))
        kept = {"identity": [SCHEMA, identity, evaluated], "row": data}
        write_json(self.directory(row.key) / ROW, kept)

    def original(self, evaluated: str) -> Original | None:
        """The original with its figures, if they are what they would be now."""
        found = _read(self.state / ORIGINAL)
        if found is None or found.get("identity") != [SCHEMA, evaluated]:
            return None
        try:
            return _ORIGINALS.validate_python(found["original"])
        except ValidationError:
            return None

    def keep_original(self, original: Original, evaluated: str) -> None:
        """Keeps the original's figures."""
        data = json.loads(_ORIGINALS.dump_json(original))
        write_json(self.state / ORIGINAL, {"identity": [SCHEMA, evaluated], "original": data})

    def structure(self, identity: str) -> dict[str, Any] | None:
        """What figures show of the original."""
        found = _read(self.state / STRUCTURE)
        return found["structure"] if found and found.get("identity") == identity else None

    def keep_structure(self, structure: dict[str, Any], identity: str) -> None:
        """Keeps it."""
        write_json(self.state / STRUCTURE, {"identity": identity, "structure": structure})

    def holds(self, comparison: dict[str, Any]) -> bool:
        """Whether comparison.json is this one, and has its tables beside it."""
        tables = all((self.output / f"comparison{form}").exists() for form in FORMS)
        return tables and _read(self.output / FILE) == comparison

    def manifest(self, key: str) -> dict[str, Any]:
        """The manifest of a row's run."""
        return _read(self.directory(key) / STATE / "manifest.json") or {}


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
