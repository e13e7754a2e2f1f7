"""What of a recipe and its command others may read: names instead of this machine's paths."""

from __future__ import annotations

import re
import shlex
from glob import has_magic
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?<![\w.~:/*-])~?/[^\s'\",;:=\[\](){}]+")  # an absolute path inside of a word


def shortened(value: str, root: Path | None = None) -> str:
    """An absolute path as others may read it; any other text as it is.

    From the recipe's directory on, or from the working directory on, if it lies there; of another
    its last part alone, with one more where that is a glob.

    Args:
        value: A path, a glob, or any other text.
        root: The recipe's directory.
    """
    path = Path(value).expanduser() if value.startswith("~/") else Path(value)
    if not path.is_absolute() or path == Path(path.anchor):
        return value
    for base in [*([root] if root is not None else []), Path.cwd()]:
        if path != base != Path(base.anchor) and path.is_relative_to(base):
            return str(path.relative_to(base))
    first = next((n for n, part in enumerate(path.parts) if has_magic(part)), len(path.parts))
    return str(Path(*path.parts[max(1, first - 1) :]))


def published(value: Any, root: Path | None = None) -> Any:
    """Plain data of a recipe, the paths in it shortened.

    Args:
        value: Mappings, lists and scalars.
        root: The recipe's directory.
    """
    if isinstance(value, dict):
        return {key: published(below, root) for key, below in value.items()}
    if isinstance(value, list):
        return [published(below, root) for below in value]
    return shortened(value, root) if isinstance(value, str) else value


def published_command(command: str) -> str:
    """A command line, the paths in its arguments shortened, also in KEY=VALUE and in YAML."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.partition("=")
        whole = f"{key}={shortened(value)}" if equals else shortened(word)
        words.append(_PATH.sub(lambda found: shortened(found[0]), whole))
    return shlex.join(words)
