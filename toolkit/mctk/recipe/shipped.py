"""Recipes that come with mctk, by name: `mctk run d2moe_mixtral` works outside a clone.

An installed package carries them as data; in a clone they are its directory `recipes/`, those of
the demo among them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "shipped_recipes"
_CLONE = Path(__file__).parents[3] / "recipes"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with mctk.

    Attributes:
        name: What the command line takes.
        path: Its file.
        command: "run" or "compare".
        model: The model that it names.
        about: Its first comment, in one line.
    """

    name: str
    path: Path
    command: str
    model: str
    about: str


def shipped_recipes() -> dict[str, ShippedRecipe]:
    """The recipes that come with mctk, by name, in alphabetical order."""
    directory = _PACKAGED if _PACKAGED.is_dir() else _CLONE
    return {path.stem: _read(path) for path in sorted(directory.glob("*.yaml"))}


def recipe_path(given: str | Path) -> Path:
    """Where a recipe is: a file if there is one, else the shipped recipe of that name.

    A name that is neither is returned as it is: whoever opens it says what is wrong, with
    `shipped_names` to suggest another.
    """
    path = Path(given)
    if path.is_file() or path.suffix or path.name != str(given):
        return path
    found = shipped_recipes().get(path.name)
    return path if found is None else found.path


def shipped_names() -> list[str]:
    """The names of the shipped recipes."""
    return list(shipped_recipes())


def _read(path: Path) -> ShippedRecipe:
    """Looks at a file without parsing it: listing must stay quick."""
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"((?:#.*\n)+)", text)
    lines = [line.lstrip("# ").rstrip() for line in comment[1].splitlines()] if comment else []
    about = re.split(r"(?<=[.:])\s", " ".join(lines), maxsplit=1)[0].rstrip(":")
    model = re.search(r"^model:\s*(\S+)", text, flags=re.MULTILINE)
    command = "compare" if re.search(r"^rows:", text, flags=re.MULTILINE) else "run"
    return ShippedRecipe(path.stem, path, command, model[1] if model else "", about)
