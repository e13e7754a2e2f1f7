"""Reads a recipe's YAML and remembers, for every key, where it was written.

Scalars follow YAML 1.2's core schema rather than PyYAML's 1.1: `1e-6` is a number, `no` and
`2024-01-01` are text. Merge keys (`<<`) are not supported; anchors are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import Node, ScalarNode, SequenceNode

from mctk.errors import RecipeError, UserError, nearest
from mctk.hookspecs import STAGES
from mctk.recipe.published import published
from mctk.recipe.shipped import recipe_path, shipped_names

KeyPath = tuple[str | int, ...]
# Keys of one mapping that exclude each other: setting one on the command line drops the others.
EXCLUSIVE = (("remove", "keep"), ("keep", "rank"), ("text", "dataset", "mix"), STAGES)


class _Loader(yaml.SafeLoader):
    """SafeLoader with its own implicit types."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_Loader` would take for something else than text."""


def _use_core_schema(cls: Any) -> None:
    cls.yaml_implicit_resolvers = {}
    number = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
    for tag, pattern, first in (
        ("null", r"~|null|", ["~", "n", ""]),
        ("bool", r"true|false", list("tf")),
        ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
        ("float", number, list("-+0123456789.")),
    ):
        exact = re.compile(f"^(?:{pattern})$")
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", exact, first)


for _class in (_Loader, _Dumper):
    _use_core_schema(_class)


class RecipeSource:
    """A recipe as written, with the command line's changes applied.

    Args:
        origin: A YAML file, or the same content as a mapping (then errors carry no line).

    Attributes:
        data: Plain dicts, lists and scalars.
        file: The file it came from, if any.
    """

    def __init__(self, origin: str | Path | Mapping[str, Any]) -> None:
        self.file: Path | None = None
        self._lines: dict[KeyPath, int] = {}
        self._flags: dict[KeyPath, str] = {}
        if isinstance(origin, Mapping):
            self.data: dict[str, Any] = json.loads(json.dumps(origin, default=str))
            return
        self.file = recipe_path(origin)
        node = self._compose(self.file)
        value = self._build(node, (), ())
        if not isinstance(value, dict):
            raise RecipeError("a recipe is a mapping of keys to values", self.file, 1)
        self.data = value

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """Returns an error at a key, placed at the nearest thing above it that was written."""
        text = f"key {'.'.join(map(str, path))}: {message}" if path else message
        for end in range(len(path), -1, -1):
            flag = self._flags.get(path[:end])
            if flag is not None:
                return RecipeError(f"{flag}: {text}")
            line = self._lines.get(path[:end])
            if line is not None:
                return RecipeError(text, self.file, line)
        return RecipeError(text, self.file)

    def override(self, assignments: Iterable[str]) -> None:
        """Applies `--set` assignments such as "steps.0.options.balance=true", in order."""
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            flag = f"--set {assignment}"
            path = key_path(name.strip())
            if not equals or "" in path:
                raise UserError(f"{flag}: write it as KEY=VALUE, e.g. --set budget.remove=0.3")
            try:
                value = yaml.load(text, _Loader)
            except yaml.YAMLError as error:
                raise UserError(f"{flag}: the value is not YAML: {_problem(error)}") from error
            self.set(path, value, flag)

    def set(self, path: KeyPath, value: Any, flag: str) -> None:
        """Sets one key; mappings on the way that are absent are made, and checked later.

        Raises:
            UserError: If a list on the way has no such entry.
        """
        at: Any = self.data
        key: Any
        for depth, key in enumerate(path):
            here = ".".join(map(str, path[:depth])) or "the recipe"
            if isinstance(at, list):
                if not isinstance(key, int) or key >= len(at):
                    raise UserError(f"{flag}: {here} has entries 0 to {len(at) - 1} only")
            else:
                key = str(key)  # an all-digit segment under a mapping is a key like any other
                for group in EXCLUSIVE:
                    if key in group:
                        for other in group:
                            if other != key:
                                at.pop(other, None)
            if depth == len(path) - 1:
                at[key] = value
                break
            below = at[key] if isinstance(at, list) else at.get(key)
            if not isinstance(below, dict | list):
                below = at[key] = {}
                self._flags[path[: depth + 1]] = flag
            at = below
        for known in [known for known in self._lines if known[: len(path)] == path]:
            del self._lines[known]
        self._flags[path] = flag

    def yaml(self) -> str:
        """Returns the recipe with all changes applied, to be read again by `load_recipe`."""
        return _written(self.data)

    def published(self) -> str:
        """Returns the same for others to read: without this machine's paths."""
        return _written(published(self.data, self.root))

    @property
    def root(self) -> Path | None:
        """The directory of the file, if there is one: where relative paths begin."""
        return self.file.resolve().parent if self.file else None

    def _compose(self, file: Path) -> Node:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            hint = "" if file.suffix else nearest(file.name, shipped_names())
            raise RecipeError(f"cannot be read: {error.strerror}{hint}", file) from error
        except UnicodeDecodeError as error:
            raise RecipeError("is not UTF-8 text", file) from error
        try:
            node = yaml.compose(text, _Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else None
            raise RecipeError(f"not YAML: {_problem(error)}", file, line) from error
        if node is None:
            raise RecipeError("is empty", file)
        return node

    def _build(self, node: Node, path: KeyPath, above: tuple[Node, ...]) -> Any:
        """Turns a node into plain values; aliases are copied, so that lines stay apart."""
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if node in above:
            raise RecipeError("an anchor contains itself", self.file, line)
        above = (*above, node)
        if isinstance(node, ScalarNode):
            return _scalar(node, self.file)
        if isinstance(node, SequenceNode):
            return [self._build(item, (*path, i), above) for i, item in enumerate(node.value)]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, ScalarNode):
                raise RecipeError("a key must be text", self.file, line)
            here = (*path, key)
            if key in values:
                first = self._lines[here]
                raise RecipeError(
                    f"key {'.'.join(map(str, here))}: given twice, first in line {first}",
                    self.file,
                    line,
                )
            self._lines[here] = line
            values[key] = self._build(value_node, here, above)
        return values


@dataclass(frozen=True)
class Part:
    """One key's value of an assembled recipe.

    Attributes:
        value: Plain data.
        source: Where it was written.
        path: The place there.
    """

    value: Any
    source: RecipeSource
    path: KeyPath


class AssembledSource(RecipeSource):
    """A recipe put together from keys of other files; errors name the place that each came from.

    Args:
        parts: By top-level key.
        home: The file and place that ask for this recipe: for whatever no key is to blame for.
    """

    def __init__(self, parts: Mapping[str, Part], home: tuple[RecipeSource, KeyPath]) -> None:
        super().__init__({key: part.value for key, part in parts.items()})
        self.file = home[0].file
        self._parts, self._home = parts, home

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """Returns an error at a key, placed where that key was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self._flags:
                return super().error(path, message)
        part = self._parts.get(str(path[0])) if path else None
        if part is not None:
            return part.source.error((*part.path, *path[1:]), message)
        source, place = self._home
        return source.error((*place, *path), message)


def key_path(text: str) -> KeyPath:
    """The keys and indices of a path such as "steps.0.options.storage"."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))


def _written(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _scalar(node: ScalarNode, file: Path | None) -> Any:
    kind = node.tag.rpartition(":")[2]
    if kind == "str":
        return node.value
    if kind == "null":
        return None
    if kind == "bool":
        return node.value == "true"
    try:
        if kind == "int":
            return int(node.value)
        if kind == "float":
            return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError as error:  # an explicit tag such as !!int before something else
        raise RecipeError(str(error), file, node.start_mark.line + 1) from error
    raise RecipeError(f"tag {node.tag} is not supported", file, node.start_mark.line + 1)


def _problem(error: yaml.YAMLError) -> str:
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    began = getattr(error, "context_mark", None)
    # The fault is often where something began, e.g. a bracket that is never closed.
    return (
        f"{problem} {getattr(error, 'context', '')} from line {began.line + 1}"
        if began
        else problem
    )
