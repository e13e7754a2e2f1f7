"""What a comparison's rows depend on, told cheaply: what did not change is not read again.

Contents decide: the hash of the model's files and of the calibration tokens. Both are remembered by
the files' sizes and times, so that a second identical call loads neither model nor torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.loading import text_stamps, versions
from ..files import write_json
from ..recipe import check_texts, draw_calibration
from .file import LoadedComparison, RowSpec

NAME_LENGTH = 60


@dataclass(frozen=True)
class Inputs:
    """What all rows read.

    Attributes:
        fingerprint: Hash of the model's files.
        calibrations: By seed, the hash of the calibration tokens; None without calibration text.
        commit: The hub model's; None of a directory.
    """

    fingerprint: str
    calibrations: dict[int, str | None]
    commit: str | None = None


def digest(value: Any) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Memory:
    """What earlier calls found out, by what it depends on; a small file in the comparison's state.

    Args:
        path: The file; damage is the same as absence.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def get(self, key: str) -> Any:
        """What is known; None if nothing."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps something."""
        if self._known.get(key) != value:
            self._known[key] = value
            write_json(self._path, self._known)


def find_inputs(loaded: LoadedComparison, memory: Memory, cache: str | Path | None) -> Inputs:
    """Hashes model and calibration tokens, or remembers them.

    Raises:
        UserError: The model or the text is not there, or there is too little of it.
    """
    recipe = loaded.rows[0].recipe
    check_texts(recipe)
    directory = Path(recipe.model)
    files = sorted(path for path in directory.glob("*") if path.is_file())
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    calibration = recipe.calibration
    key = "inputs " + digest(
        [
            stamps,
            calibration.model_dump(mode="json") if calibration else None,
            text_stamps(_sources(calibration)),
            loaded.settings.seeds,
            versions(),
        ]
    )
    known = memory.get(key) if files else None
    if known is not None:
        seeds = {int(seed): value for seed, value in known["calibrations"].items()}
        return Inputs(known["fingerprint"], seeds)
    found = _read_inputs(loaded, cache)
    seeds_found = {str(seed): value for seed, value in found.calibrations.items()}
    memory.put(key, {"fingerprint": found.fingerprint, "calibrations": seeds_found})
    return found


def _sources(calibration: Any) -> list[Any]:
    if calibration is None:
        return []
    return list(calibration.mix) if calibration.mix is not None else [calibration]


def _read_inputs(loaded: LoadedComparison, cache: str | Path | None) -> Inputs:
    from ..checkpoint import open_source
    from ..evaluate.loading import load_tokenizer
    from ..statistics import cache_directory

    recipe = loaded.rows[0].recipe
    source = open_source(recipe.model, recipe.revision)
    fingerprint = source.fingerprint(cache_directory(cache))
    calibrations: dict[int, str | None] = dict.fromkeys(loaded.settings.seeds)
    if recipe.calibration is not None:
        tokenizer = load_tokenizer(source.path, recipe.trust_remote_code)
        for seed in calibrations:
            calibrations[seed] = draw_calibration(recipe, tokenizer, seed).digest
    return Inputs(fingerprint, calibrations, source.commit)


def row_identity(row: RowSpec, inputs: Inputs) -> str:
    """Hash of all that a row's checkpoint depends on."""
    return digest([row.recipe.canonical(), inputs.fingerprint, inputs.calibrations[row.seed]])


def evaluation_identity(loaded: LoadedComparison, inputs: Inputs) -> str:
    """Hash of all that figures depend on besides the checkpoint that they are measured on."""
    settings = loaded.settings
    section = settings.evaluate
    return digest(
        [
            section.model_dump(mode="json") if section else None,
            text_stamps(section.perplexity) if section else None,
            inputs.fingerprint,
            settings.device,
            settings.dtype,
            versions(),
        ]
    )


def row_key(row: RowSpec, seeds: int, identity: str) -> str:
    """A row's directory: its name, share and seed for people, its hash so that no two meet."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in row.name)[:NAME_LENGTH]
    share = f"-{100 * row.budget.remove:g}" if row.budget is not None else ""
    seed = f"-s{row.seed}" if seeds > 1 else ""
    return f"{name}{share}{seed}-{identity[:8]}"
