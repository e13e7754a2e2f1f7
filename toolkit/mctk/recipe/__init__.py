"""Recipes: YAML in, checked settings out, every mistake named with its line.

Loading a recipe imports the plugins it may name, but neither torch nor transformers.
"""

from mctk.recipe.load import load_recipe
from mctk.recipe.published import published_command
from mctk.recipe.schema import (
    Allocate,
    Budget,
    Calibration,
    Divergence,
    Evaluate,
    Layers,
    PerplexityText,
    Recipe,
    Size,
    Speed,
    Step,
)
from mctk.recipe.texts import check_texts, draw_calibration, placed

__all__ = [
    "Allocate",
    "Budget",
    "Calibration",
    "Divergence",
    "Evaluate",
    "Layers",
    "PerplexityText",
    "Recipe",
    "Size",
    "Speed",
    "Step",
    "check_texts",
    "draw_calibration",
    "load_recipe",
    "placed",
    "published_command",
]
