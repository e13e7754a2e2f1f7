"""Recipes: YAML in, checked settings out, every mistake named with its line.

Loading a recipe imports the plugins it may name, but neither torch nor transformers.
"""

from mctk.recipe.load import load_recipe
from mctk.recipe.schema import (
    Allocate,
    Budget,
    Calibration,
    Evaluate,
    Layers,
    PerplexityText,
    Recipe,
    Size,
    Step,
)

__all__ = [
    "Allocate",
    "Budget",
    "Calibration",
    "Evaluate",
    "Layers",
    "PerplexityText",
    "Recipe",
    "Size",
    "Step",
    "load_recipe",
]
