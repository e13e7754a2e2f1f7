"""Every recipe that the project ships loads, and those of the demo plan as well."""

from __future__ import annotations

from pathlib import Path

import pytest
from mctk.plan import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_loads(path: Path):
    registry = load_plugins()
    recipe = load_recipe(path, registry=registry)
    assert recipe.steps and recipe.evaluate
    if (RECIPES / "demo") not in Path(recipe.model).parents:
        return  # a model of the hub; tests/plan plans its true shapes
    plan = describe(make_plan(recipe, registry, weights=False))
    assert plan["sizes"]["exact"] and plan["calibration"]["checked"]
    assert all(plan["evaluation"]["windows"].values()) and not plan["warnings"]
