"""A recipe's texts: found before anything else is done, and what is wrong with one at its key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mctk.data import Source, TextError, TokenWindows, calibration_windows
from mctk.recipe.source import KeyPath

if TYPE_CHECKING:
    from mctk.recipe.schema import Recipe


def sources(recipe: Recipe) -> Iterator[tuple[KeyPath, Source]]:
    """Yields where a recipe takes text from, calibration first, with the keys of each."""
    calibration = recipe.calibration
    if calibration is not None and calibration.mix is None:
        yield ("calibration",), calibration
    for number, part in enumerate((calibration and calibration.mix) or ()):
        yield ("calibration", "mix", number), part
    for number, text in enumerate(recipe.evaluate.perplexity if recipe.evaluate else ()):
        yield ("evaluate", "perplexity", number), text


@contextlib.contextmanager
def placed(recipe: Recipe) -> Iterator[None]:
    """What is wrong in here with a text of a recipe is said at its line and key.

    Raises:
        RecipeError: Instead of a `TextError`.
    """
    try:
        yield
    except TextError as error:
        for path, source in sources(recipe):
            if source is error.source:
                key = (error.key,) if error.key else ()
                raise recipe.error((*path, *key), error.message) from error
        raise


def check_texts(recipe: Recipe) -> None:
    """Looks for all local text; nothing is read.

    Raises:
        RecipeError: A file is missing or of no kind that is known.
    """
    with placed(recipe):
        for _, source in sources(recipe):
            source.files()


def draw_calibration(recipe: Recipe, tokenizer: Any, seed: int | None = None) -> TokenWindows:
    """Draws a recipe's calibration sequences; it has a calibration.

    Args:
        recipe: The recipe.
        tokenizer: The model's.
        seed: In the place of the recipe's.

    Raises:
        RecipeError: Text is missing, damaged or too little.
    """
    calibration = recipe.calibration
    assert calibration is not None
    with placed(recipe):
        return calibration_windows(
            tokenizer,
            calibration.source,
            calibration.sequences,
            calibration.length,
            recipe.seed if seed is None else seed,
        )
