"""`mctk schema`: editors are told what the loader takes, and refuse what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from mctk.cli.schema import command, json_schema
from mctk.recipe.source import RecipeSource
from mctk.registry import Registry, load_plugins

ROOT = Path(__file__).parents[1]
FILES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "benchmarks").glob("*.yaml"))]
BASE = {"model": "some/model", "steps": [{"decompose": "svd", "size": {"keep": 0.5}}]}


@pytest.fixture(scope="module")
def schema():
    return json_schema(load_plugins())


@pytest.fixture(scope="module")
def validator(schema):
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_are_valid(validator, path):
    validator.validate(RecipeSource(path).data)


def test_recipes_of_the_documentation_are_valid(validator):
    text = (ROOT / "docs" / "recipes.md").read_text()
    whole = [
        yaml.safe_load(block.partition("\n```")[0])
        for block in text.split("\n```yaml\n")[1:] + text.split("\n```yaml comparison\n")[1:]
    ]
    whole = [data for data in whole if "model" in data]
    assert any("rows" in data for data in whole) and any("steps" in data for data in whole)
    for data in whole:
        validator.validate(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [{"prune": "naee", "targets": ["experts.*"], "layers": 3}], "output": "x"},
        {"steps": [{"quantize": "rtn", "layers": "0-3,5", "options": {"bits": 3, "group": None}}]},
        {"budget": {"remove": 0.4}, "allocate": {"options": {}}, "evaluate": None},
        {"allocate": {"method": "by_loss", "options": {"min_keep": 0.1}}},
        {"steps": [{"decompose": "svd", "size": "auto"}], "calibration": {"text": "a.txt"}},
        {"evaluate": {"perplexity": [{"text": "a.txt"}], "speed": True, "divergence": {}}},
    ],
)
def test_what_the_loader_takes_is_valid(validator, changes):
    validator.validate({**BASE, **changes})


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"modle": "x"}, []),
        ({"model": 3}, ["model"]),
        ({"budget": {"remove": "0.4"}}, ["budget"]),
        ({"steps": []}, ["steps"]),
        ({"steps": [{"decompose": "svdd"}]}, ["steps", 0, "decompose"]),
        ({"steps": [{"decompose": "svd", "prune": "naee"}]}, ["steps", 0]),
        ({"steps": [{"targets": "experts.*"}]}, ["steps", 0]),
        ({"steps": [{"decompose": "svd", "option": {}}]}, ["steps", 0]),
        ({"steps": [{"decompose": "svd", "options": {"stor": 1}}]}, ["steps", 0, "options"]),
        (
            {"steps": [{"quantize": "rtn", "options": {"bits": 5}}]},
            ["steps", 0, "options", "bits"],
        ),
        ({"steps": [{"quantize": "rtn", "size": "auto"}]}, ["steps", 0, "size"]),
        ({"steps": [{"decompose": "svd", "size": {}}]}, ["steps", 0, "size"]),
        ({"allocate": {"method": "svd"}}, ["allocate"]),
        ({"rows": [{"steps": [{"merge": "svd"}]}]}, []),  # and no key of recipes beside it
    ],
)
def test_mistakes_are_found_at_their_place(validator, changes, place):
    errors = list(validator.iter_errors({**BASE, **changes}))
    assert errors
    places = [list(error.absolute_path) for error in errors]
    assert any(found[: len(place)] == place for found in places), places


def test_rows_of_a_comparison_are_checked(validator):
    whole = {"model": "m", "budgets": {"remove": [0.4]}, "rows": [{"steps": BASE["steps"]}]}
    validator.validate(whole)
    for key, value in (("steps", [{"merge": "svd"}]), ("allocate", {"method": "x"}), ("nam", "x")):
        wrong = copy.deepcopy(whole)
        wrong["rows"][0][key] = value
        assert not validator.is_valid(wrong), key


def test_methods_are_the_registrys(schema):
    registry = load_plugins()
    properties = schema["$defs"]["Step"]["properties"]
    for stage in ("merge", "decompose", "prune", "quantize"):
        assert properties[stage]["enum"] == [method.name for method in registry.methods(stage)]
        assert all(properties[stage]["enumDescriptions"])
    bits = schema["$defs"]["RtnOptions"]["properties"]["bits"]
    assert bits["description"] and bits["default"] == 4
    none = json_schema(Registry([]))
    assert not none["$defs"]["Step"]["allOf"]


def test_the_command_prints_it(capsys, schema):
    command.main([], standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == schema
