"""Pages that are made of the code: keys of recipes, options of methods, commands, recipes."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le, Lt, MinLen
from click.testing import CliRunner
from mctk.cli import COMMANDS, cli
from mctk.comparison.schema import ComparisonFile
from mctk.hookspecs import STAGES, Method, MethodOptions
from mctk.recipe import Recipe
from mctk.recipe.load import model_in
from mctk.recipe.shipped import shipped_recipes
from mctk.registry import load_plugins
from pydantic import BaseModel

# What is written for types that are more than they look.
_WORDS = {
    "Layers": "all, a number, a range or a list of them",
    "Size": "`auto`, `{keep: …}` or `{rank: …}`",
    "Path": "path",
    "Any": "as in a recipe",
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "`true` or `false`",
    "dict": "mapping",
}


def keys() -> str:
    """Every key of recipes and comparison files, with its type, default and meaning."""
    head = (
        "# Keys and types\n\nMade from the models that check recipes; [Recipes](../recipes.md) "
        "says what they are for, and `mctk schema` gives them to an editor.\n"
    )
    tables = []
    for title, model in (("Recipe", Recipe), ("Comparison file", ComparisonFile)):
        rows = [f"| `{path}` | {kind} | {default} | {text} |" for path, kind, default, text in
                _keys(model)]  # fmt: skip
        tables.append(f"## {title}\n\n{_table(['key', 'type', 'default', 'meaning'], rows)}")
    return "\n".join([head, *tables])


def _keys(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and description of a model's keys, and of those below them."""
    for name, field in model.model_fields.items():
        path = f"{before}{name}"
        if model.__name__ == "Step" and name == "method":
            for stage in STAGES[1:]:
                yield f"{before}{stage}", "a method's name", "–", f"a {stage} method"
            continue
        default = "required" if field.is_required() else _value(field.get_default())
        if path in ("allocate.options", "steps[].options"):
            default = "`{}`"
        elif path == "output":
            default = "`runs/<file>`"
        kind = ", ".join([_type(field.annotation), *filter(None, map(_bound, field.metadata))])
        yield path, kind, default, _cell(field.description or "")
        below = model_in(field.annotation)
        if below is not None:
            many = "[]" if "list[" in str(field.annotation) else ""
            yield from _keys(below, f"{path}{many}.")


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return f"`{value if isinstance(value, str) else json.dumps(value, default=str)}`"


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if str(origin) == "typing.Literal":
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    if parts:
        return " or ".join(_type(part) for part in parts if part is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Method):
        return "a method's name"
    if isinstance(annotation, type) and issubclass(annotation, MethodOptions):
        return "mapping"
    name = getattr(annotation, "__name__", str(annotation))
    if name in _WORDS:
        return _WORDS[name]
    return "mapping"


def _bound(found: Any) -> str:
    """A bound in words."""
    for kind, key, word in (
        (Ge, "ge", "at least"),
        (Gt, "gt", "above"),
        (Le, "le", "at most"),
        (Lt, "lt", "below"),
    ):
        if isinstance(found, kind):
            return f"{word} {getattr(found, key):g}"
    return "not empty" if isinstance(found, MinLen) else ""


def methods() -> str:
    """All methods by stage."""
    lines = [
        "# Methods\n\nWhat recipes can name, as `mctk plugins` lists it. Stages come in this order "
        "of work; every method is a [plugin](../write_a_plugin.md).\n"
    ]
    registry = load_plugins()
    for stage in STAGES:
        rows = [
            f"| [`{method.name}`](../reference/options.md#{stage}{method.name}) | "
            f"{method.summary} | {method.reference or '–'} |"
            for method in registry.methods(stage)
        ]
        if rows:
            lines.append(f"## {stage}\n\n{_table(['method', 'what it does', 'source'], rows)}")
    return "\n".join(lines)


def options() -> str:
    """Every method's options, as `mctk plugins show` prints them."""
    lines = ["# Options of methods\n\nAs `mctk plugins show METHOD` prints them.\n"]
    for method in load_plugins().methods():
        name = f"{method.stage}/{method.name}"
        shown = json.loads(_called("plugins", "show", name, "--json"))
        lines.append(f"## {name}\n\n{method.summary}\n")
        needs = sorted({need for each in shown["needs"].values() for need in each})
        if needs:
            lines.append("Measures " + ", ".join(f"`{need}`" for need in needs) + ".\n")
        rows = [
            f"| `{o['name']}` | {_cell(o['type'])} | {_value(o['default'])} | "
            f"{_cell(o['description'])} |"
            for o in shown["options"]
        ]
        lines.append(
            _table(["option", "type", "default", "meaning"], rows) if rows else "No options.\n"
        )
    return "\n".join(lines)


def commands() -> str:
    """Every command with its arguments, options and examples."""
    lines = ["# Command line\n\nAs `mctk COMMAND --help` prints it.\n"]
    for name, about in COMMANDS.items():
        module = importlib.import_module(f"mctk.cli.{name.replace('-', '_')}")
        lines += [f"## mctk {name}\n\n{about}\n", *_command(module.command, f"mctk {name}")]
    return "\n".join(lines)


def _command(command: click.Command, path: str) -> Iterator[str]:
    """One command's section, and its subcommands'."""
    context = click.Context(command, info_name=path)
    yield f"```text\n{' '.join(command.get_usage(context).split())}\n```\n"
    yield f"{_cell(command.help or '')}\n"
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            rows.append(f"| `{record[0]}` | {_cell(record[1])} |")
    yield _table(["option", "meaning"], rows)
    if command.epilog:
        yield "```text\n" + command.epilog.replace("\b\n", "").replace("`", "") + "\n```\n"
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield f"### {path} {name}\n"
            yield from _command(below, f"{path} {name}")


def shipped() -> str:
    """The recipes that come with mctk, each in full."""
    lines = [
        "# Shipped recipes\n\n`mctk recipes` lists them; `mctk run`, `plan` and `compare` take "
        "their names where they take files.\n"
    ]
    for name, recipe in shipped_recipes().items():
        text = recipe.path.read_text(encoding="utf-8").rstrip()
        lines.append(f"## {name}\n\n```yaml\n{text}\n```\n")
    return "\n".join(lines)


def _called(*arguments: str) -> str:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False).output


def _table(columns: list[str], rows: list[str]) -> str:
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *rows]) + "\n"


def _cell(text: str) -> str:
    """Text for a cell: on one line, bars and angle brackets as such."""
    flat = " ".join(text.replace("\b", " ").split())
    return re.sub(r"[|<]", lambda found: {"|": "&#124;", "<": "&lt;"}[found[0]], flat)
