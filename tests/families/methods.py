"""Three methods run on a family's tiny model: what each needs, and what its result must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

METHODS: dict[str, dict[str, Any]] = {
    "d2moe": {
        "budget": {"remove": 0.4, "of": "experts"},
        "steps": [
            {"merge": "fisher", "targets": "experts.*"},
            {
                "decompose": "delta_svd",
                "targets": "experts.*",
                "size": "auto",
                "options": {"storage": "pivoted", "rank_multiple": 1},
            },
            {
                "prune": "semi_dynamic",
                "targets": "experts.*",
                "options": {"static": 0.1, "channel_multiple": 2},
            },
        ],
    },
    # Not of the experts alone: every linear layer that the adapter offers is decomposed.
    "svd_llm": {
        "budget": {"remove": 0.4, "of": "targets"},
        "steps": [
            {
                "decompose": "svd_llm",
                "targets": "*",
                "size": "auto",
                "options": {"storage": "pivoted", "rank_multiple": 1},
            }
        ],
    },
    "reap": {"steps": [{"prune": "reap", "targets": "experts.*", "size": {"keep": 0.75}}]},
}
"""A recipe for each method."""


def write_recipe(directory: Path, method: str, keys: Mapping[str, Any]) -> Path:
    """Writes a method's recipe over the model and the text in a directory."""
    recipe = {
        "model": str(directory / "model"),
        "output": str(directory / method),
        "calibration": {
            "text": str(directory / "text.jsonl"),
            "sequences": 8,
            "length": 32,
            "batch": 4,
        },
        "dtype": "float32",
        "trust_remote_code": True,
        "gate": True,
        **keys,
    }
    path = directory / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def results(directory: Path, methods: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Each method's metrics, or the error: in one set, or one by one where the set fails."""
    registry = load_plugins()

    def recipe(method: str) -> Any:
        path = write_recipe(directory, method, methods[method])
        return load_recipe(path, registry=registry)

    def together(names: list[str]) -> list[Any]:
        return run(
            [recipe(name) for name in names],
            registry,
            cache=directory / "cache",
            keep_going=len(names) > 1,
            fresh_process=False,
        )

    try:
        return dict(zip(methods, together(list(methods)), strict=True))
    except Exception:  # one method's statistics may be what cannot be had
        found: dict[str, Any] = {}
        for name in methods:
            try:
                found[name] = together([name])[0]
            except Exception as error:
                found[name] = error
        return found


def check_result(found: Any) -> None:
    """Raises what ended a run, or says what its metrics should not be."""
    if isinstance(found, Exception):
        raise found
    if found["gate"]["streamed_equal"] is not True:
        raise AssertionError("the written files give other logits than the passes")
    if found["sizes"]["planned"] != found["sizes"]["attained"]:
        raise AssertionError(f"not of the planned size: {found['sizes']}")
    budget = found.get("budget")
    if budget is not None and budget["shortfall_fraction"] < 0:
        raise AssertionError(f"above the budget: {budget}")
    rows = [row for layer in found["layers"] for row in layer["trace"]]
    if not rows or not all(row["layer_error"] > 0 for row in rows):
        raise AssertionError("some step left a layer as it was")
