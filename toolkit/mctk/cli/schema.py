"""`mctk schema`: what a recipe may hold, as JSON schema: editors complete and check by it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mctk.hookspecs import Method
    from mctk.registry import Registry

EPILOG = """\b
Examples:
  mctk schema > .mctk-schema.json

\b
The first line of a recipe then says where it is, for VS Code (with its YAML extension) and for
every editor with the YAML language server:
  # yaml-language-server: $schema=.mctk-schema.json

It knows the methods that are installed, and their options: write it anew when a plugin is added."""

DRAFT = "http://json-schema.org/draft-07/schema#"  # which every editor reads
Schema = dict[str, Any]


@click.command(epilog=EPILOG)
def command() -> None:
    """Print the JSON schema of recipes and of comparison files, for editors."""
    from mctk.registry import load_plugins

    click.echo(json.dumps(json_schema(load_plugins()), indent=1, ensure_ascii=False))


def json_schema(registry: Registry) -> Schema:
    """The schema of recipes and comparison files, with the methods of a registry.

    It follows the pydantic models that recipes are checked by. What only they check, such as two
    keys that exclude each other or a size without a budget, `mctk plan` says.
    """
    from pydantic.json_schema import GenerateJsonSchema, models_json_schema

    from mctk.comparison.schema import ComparisonFile
    from mctk.recipe import Recipe

    class Plain(GenerateJsonSchema):
        def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
            return {}  # a `Method`, whose place `_step` writes; of a plugin's options: anything

        def field_title_should_be_set(self, schema: Any) -> bool:
            return False  # titles only repeat the keys

    methods = registry.methods()
    models: list[type[Any]] = [Recipe, ComparisonFile, *(method.Options for method in methods)]
    references, whole = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], schema_generator=Plain
    )
    defs: Schema = whole["$defs"]
    options = {method: references[method.Options, "validation"] for method in methods}
    for model in {method.Options for method in methods}:
        defs[_name(references[model, "validation"])].pop("description", None)
    defs["Size"] = _size(defs["Size"])
    defs["Step"] = _step(defs["Step"], options)
    defs["Allocate"] = _allocate(defs["Allocate"], options)
    rows = defs["RowEntry"]["properties"]
    comparison = defs["ComparisonFile"]
    steps = defs["Recipe"]["properties"]["steps"]
    rows["steps"] |= steps
    for place in (rows, comparison["properties"]):
        place["allocate"] |= defs["Recipe"]["properties"]["allocate"]
    for file in (defs["Recipe"], comparison):
        file["required"].remove("output")
    return {
        "$schema": DRAFT,
        "title": "mctk recipe or comparison",
        "type": "object",
        "if": {"required": ["rows"]},
        "then": {"$ref": "#/$defs/ComparisonFile"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": defs,
    }


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _size(own: Schema) -> Schema:
    """`auto`, or a mapping with one key."""
    return {
        "description": own["description"],
        "anyOf": [{"const": "auto"}, {**own, "minProperties": 1, "maxProperties": 1}],
    }


def _names(methods: list[Method], description: str) -> Schema:
    """The names of some methods, with what each does."""
    about = [f"{m.summary} {m.reference}".strip() for m in methods]
    names = [method.name for method in methods]
    return {"description": description, "enum": names, "enumDescriptions": about}


def _step(own: Schema, options: dict[Method, Schema]) -> Schema:
    """A step: exactly one stage with a method's name; options and size are that method's."""
    common = {key: value for key, value in own["properties"].items() if key != "method"}
    stages: dict[str, list[Method]] = {}
    for method in options:
        if method.stage != "allocate":
            stages.setdefault(method.stage, []).append(method)
    named = {stage: _names(found, f"a {stage} method") for stage, found in stages.items()}
    return {
        "type": "object",
        "description": own["description"],
        "properties": {**named, **common, "options": {"type": "object"}},
        "additionalProperties": False,
        "oneOf": [{"required": [stage]} for stage in stages],
        "allOf": [
            _of_method(method, method.stage, reference)
            for method, reference in options.items()
            if method.stage != "allocate"
        ],
    }


def _allocate(own: Schema, options: dict[Method, Schema]) -> Schema:
    """An allocator with its options; the default one may go without a name."""
    found = {method: ref for method, ref in options.items() if method.stage == "allocate"}
    return {
        "type": "object",
        "description": own["description"],
        "properties": {
            "method": _names([*found], "an allocate method"),
            "options": {"type": "object"},
        },
        "additionalProperties": False,
        "allOf": [_of_method(method, "method", reference) for method, reference in found.items()],
    }


def _of_method(method: Method, key: str, reference: Schema) -> Schema:
    """What a method's name under a key brings with it."""
    then: Schema = {"options": reference}
    if method.stage != "allocate" and not method.takes_size:
        then["size"] = {"type": "null", "description": "the method takes no size"}
    named = {"properties": {key: {"const": method.name}}, "required": [key]}
    return {"if": named, "then": {"properties": then}}
