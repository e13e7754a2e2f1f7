"""Every recipe that the project ships loads, and those of the demo plan as well."""

from __future__ import annotations

from pathlib import Path

import pytest
from mctk.comparison.file import load_comparison
from mctk.planning import describe, make_plan
from mctk.recipe import check_texts, load_recipe
from mctk.registry import load_plugins

RECIPES = Path(__file__).parents[1] / "recipes"


PATHS = sorted(RECIPES.glob("*.yaml"))
COMPARISONS = [path for path in PATHS if path.stem.startswith("compare_")]


@pytest.mark.parametrize(
    "path", [path for path in PATHS if path not in COMPARISONS], ids=lambda path: path.stem
)
def test_a_shipped_recipe_loads(path: Path):
    registry = load_plugins()
    recipe = load_recipe(path, registry=registry)
    assert recipe.steps and recipe.evaluate
    if (RECIPES / "demo") not in Path(recipe.model).parents:
        return  # a model of the hub; tests/planning plans its true shapes
    plan = describe(make_plan(recipe, registry, weights=False))
    assert plan["sizes"]["exact"] and plan["calibration"]["checked"]
    assert all(plan["evaluation"]["windows"].values()) and not plan["warnings"]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_shipped_comparison_loads(path: Path):
    """Every row of the demo's can be planned at every budget."""
    registry = load_plugins()
    # A model that a script makes (its rows are of a dense one) is not there yet.
    other = [f"model={RECIPES / 'demo' / 'model'}"] if path.stem == "compare_smollm2" else []
    loaded = load_comparison([path], overrides=other, registry=registry)
    methods = {row.name for row in loaded.rows if row.budget in loaded.budgets}
    if other or (RECIPES / "demo") not in Path(loaded.rows[0].recipe.model).parents:
        return
    assert len(methods) >= 16 and len(loaded.budgets) == 3
    model = None
    for row in loaded.rows:
        model = make_plan(row.recipe, registry, model=model).model


@pytest.mark.parametrize(
    "path", sorted((RECIPES.parent / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_comparison_of_the_methods_pages_loads(path: Path):
    """Pages name it as the command that repeats their figures; plans are left to the comparison."""
    loaded = load_comparison([path], registry=load_plugins())
    check_texts(loaded.rows[0].recipe)
    assert len({row.name for row in loaded.rows}) == len(loaded.settings.rows)
    pages = (RECIPES.parent / "docs" / "methods").glob("*.md")
    assert any(f"mctk compare benchmarks/{path.name}" in page.read_text() for page in pages)


def test_the_comparisons_do_the_same():
    """Same steps on the demo model and on Mixtral, but for what a paper's row is known by."""
    demo, mixtral = (
        load_comparison([RECIPES / f"compare_{name}.yaml"], registry=load_plugins())
        for name in ("demo", "mixtral")
    )
    steps = {
        row.name: [(step.stage, step.method.name, step.options) for step in row.recipe.steps]
        for row in demo.rows
    }
    for row in mixtral.rows:
        assert [(step.stage, step.method.name, step.options) for step in row.recipe.steps] == steps[
            row.name
        ], row.name
