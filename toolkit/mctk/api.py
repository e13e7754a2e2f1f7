"""What the command line does, as functions: for notebooks and scripts.

`mctk.compress`, `plan`, `load` and `compare` stand for `mctk run`, `plan` and `compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison.result import Comparison
    from .recipe import Recipe
    from .registry import Registry

RecipeLike = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class CompressedModel:
    """A finished run.

    Attributes:
        path: Its directory: the checkpoint, report.md, metrics.json, run.log.
        metrics: What metrics.json holds: sizes, perplexity, the error of every layer and pass.
    """

    path: Path
    metrics: dict[str, Any]

    def load(self, **options: Any) -> Any:
        """Loads the checkpoint; see `mctk.load`."""
        return load(self.path, **options)

    @property
    def report(self) -> str:
        """The report, in Markdown."""
        return (self.path / "report.md").read_text(encoding="utf-8")

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.report


def compress(
    model: str | Path | None = None,
    recipe: RecipeLike = "",
    output: str | Path | None = None,
    *,
    cache: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> CompressedModel:
    """Compresses a model as a recipe says, as `mctk run` does; goes on where it was stopped.

    Args:
        model: A model directory or a hub name, in the recipe's place; None takes the recipe's.
        recipe: A file, the name of a shipped recipe (`mctk recipes`), or its content as a dict.
        output: Directory to write, in the recipe's place.
        cache: Directory of the statistics cache.
        progress: Whether to say what is being done, on standard error.
        **settings: Top-level keys of the recipe, in its place, e.g. device="cuda:0",
            budget={"remove": 0.4, "of": "experts"}, evaluate=None.

    Returns:
        The finished run.

    Raises:
        UserError: Something is wrong with recipe, model, text or output; nothing was written then.
    """
    from .engine import Reporter, run

    registry = _registry()
    loaded = _recipe(recipe, registry, model, output, settings)
    reporter = Reporter(quiet=not progress)
    [metrics] = run([loaded], registry, cache=cache, reporter=reporter)
    return CompressedModel(loaded.output, metrics)


def plan(recipe: RecipeLike, model: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Says what a run will store and cost, as `mctk plan --json` does; reads headers only.

    Args:
        recipe: As in `compress`.
        model: As in `compress`.
        **settings: As in `compress`.

    Raises:
        UserError: Something is wrong with recipe, model or text.
    """
    from .evaluate.loading import resolve_device
    from .planning import describe, make_plan

    registry = _registry()
    loaded = _recipe(recipe, registry, model, None, settings)
    return describe(make_plan(loaded, registry, resolve_device(loaded.device), weights=False))


def load(directory: str | Path, **options: Any) -> Any:
    """Loads a checkpoint, compressed or not, for use: in evaluation mode, by its own class.

    Args:
        directory: A model directory, or a hub name.
        **options: For `from_pretrained`: dtype, device_map, revision, trust_remote_code ...

    Returns:
        The transformers model.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(directory), **options)
    return model.eval()


def compare(
    recipes: RecipeLike | Sequence[str | Path],
    remove: Sequence[float] | None = None,
    output: str | Path | None = None,
    *,
    model: str | Path | None = None,
    cache: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Comparison:
    """Runs many methods at many budgets on one calibration, as `mctk compare` does.

    Args:
        recipes: A comparison's file, its content as a dict, or recipes, each of which is a row.
        remove: Shares to remove, in the place of the file's budgets.
        output: Directory to write, in the file's place.
        model: As in `compress`.
        cache: As in `compress`.
        jobs: Processes that evaluate; by default as many as cores and memory allow.
        progress: As in `compress`.
        **settings: Top-level keys of the comparison, in its place.

    Returns:
        All rows with their figures; those that failed with the reason.

    Raises:
        UserError: Something is wrong with what all rows share.
    """
    from .comparison.file import load_comparison
    from .comparison.run import run_comparison
    from .engine import Reporter

    registry = _registry()
    given: Any = recipes if not isinstance(recipes, str | Path) else [recipes]
    flags = {**settings, "model": _text(model), "output": _text(output)}
    loaded = load_comparison(given, (), registry, remove, **flags)
    reporter = Reporter(quiet=not progress)
    return run_comparison(loaded, registry, cache=cache, reporter=reporter, jobs=jobs)


def _registry() -> Registry:
    from .registry import load_plugins

    return load_plugins()


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _recipe(
    recipe: RecipeLike,
    registry: Registry,
    model: str | Path | None,
    output: str | Path | None,
    settings: dict[str, Any],
) -> Recipe:
    """A checked recipe with what the call says in place of its own keys."""
    from .errors import UserError
    from .recipe import load_recipe
    from .recipe.source import RecipeSource

    if not recipe:
        raise UserError("recipe: give a file, the name of a shipped recipe, or a dict")
    source = RecipeSource(recipe)
    for key, value in {**settings, "model": _text(model), "output": _text(output)}.items():
        if value is not None or key in settings:
            source.set((key,), value, f"{key}={value!r}")
    return load_recipe(source, (), registry)
