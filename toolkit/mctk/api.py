"""What the command line does, as functions: for notebooks and scripts.

`mctk.compress`, `plan`, `compare` and `measure` do what `mctk run`, `plan`, `compare` and `eval`
do, and raise `mctk.UserError` where those print one line and stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    def load(self, **options: Any) -> PreTrainedModel:
        """Loads the checkpoint; see `mctk.load`."""
        return load(self.path, **options)

    def push_to_hub(self, repository: str, private: bool = False) -> str:
        """Uploads the checkpoint and its model card, as `mctk push` does.

        Args:
            repository: owner/name; made if it does not exist.
            private: Whether it is made so that only its owner sees it.

        Returns:
            Its address.

        Raises:
            UserError: No token, no permission, another model's repository, or files that were not
                checked (gate: false).
        """
        from .publish import check_result, prepare, push

        prepare(repository, private, check_result(self.path))
        return push(self.path, repository)

    @property
    def report(self) -> str:
        """The report, in Markdown."""
        return (self.path / "report.md").read_text(encoding="utf-8")

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.report


def compress(
    model: str | Path | None = None,
    *,
    recipe: RecipeLike,
    output: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    **keys: Any,
) -> CompressedModel:
    """Compresses a model as a recipe says, as `mctk run` does; goes on where it was stopped.

    Args:
        model: A model directory or a name on the hub, in the recipe's place.
        recipe: A file, the name of a recipe that comes with mctk (`mctk recipes`), or what a file
            holds as a dict. In a dict paths are relative to the working directory.
        output: Directory to write, in the recipe's place.
        set: Single keys to change, as `--set` names them: {"budget.remove": 0.6}.
        cache: Directory of the statistics cache; by default $MCTK_CACHE, or mctk in the user's
            cache directory.
        progress: Whether to say what is being done, on standard error.
        **keys: Top-level keys of the recipe, in its place: device="cuda:0", evaluate=None.

    Returns:
        The finished run.

    Raises:
        UserError: Something is wrong with recipe, model, text or output. Most of it shows before
            weights are read.
    """
    from .engine import Reporter, run

    registry = _registry()
    loaded = _recipe(recipe, registry, {**keys, "model": model, "output": output}, set)
    reporter = Reporter(quiet=not progress)
    [metrics] = run([loaded], registry, cache=cache, reporter=reporter)
    return CompressedModel(loaded.output, metrics)


def plan(
    model: str | Path | None = None,
    *,
    recipe: RecipeLike,
    set: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Says what a run will store and cost; reads config.json and headers, no weights.

    Args:
        model: As in `compress`.
        recipe: As in `compress`.
        set: As in `compress`.
        **keys: As in `compress`.

    Returns:
        What `mctk plan --json` prints: "sizes" (parameters and bytes, original and planned),
        "layers", "statistics", "resources" (bytes of memory and disk), "warnings" and more.

    Raises:
        UserError: Something is wrong with recipe, model or text.
    """
    from .evaluate.loading import resolve_device
    from .planning import describe, make_plan

    registry = _registry()
    loaded = _recipe(recipe, registry, {**keys, "model": model}, set)
    return describe(make_plan(loaded, registry, resolve_device(loaded.device), weights=False))


def compare(
    recipes: RecipeLike | Sequence[str | Path],
    *,
    remove: Sequence[float] | None = None,
    model: str | Path | None = None,
    output: str | Path | None = None,
    cache: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = True,
    **keys: Any,
) -> Comparison:
    """Runs many methods at many budgets on one calibration, as `mctk compare` does.

    Args:
        recipes: A comparison: its file, name, or content as a dict. Or recipes, files or names,
            each of which becomes a row.
        remove: Shares to remove, each between 0 and 1, in the place of the budgets.
        model: A model directory or a name on the hub, in the file's place.
        output: Directory to write, in the file's place; the page with figures is comparison.html.
        cache: As in `compress`.
        jobs: Processes that evaluate; by default as many as cores and memory allow, 1 on a GPU.
        progress: As in `compress`.
        **keys: Top-level keys of the comparison, in its place.

    Returns:
        Every row with its figures, or with the reason why it has none; a notebook shows it as
        tables.

    Raises:
        UserError: Something is wrong with what all rows share.
    """
    from .comparison.file import load_comparison
    from .comparison.run import run_comparison
    from .engine import Reporter

    registry = _registry()
    given = [recipes] if isinstance(recipes, str | Path) else recipes
    flags = _plain({**keys, "model": model, "output": output})
    loaded = load_comparison(given, (), registry, remove, **flags)
    reporter = Reporter(quiet=not progress)
    return run_comparison(loaded, registry, cache=cache, reporter=reporter, jobs=jobs)


def measure(
    model: str | Path,
    *,
    perplexity: Sequence[Mapping[str, Any]] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    baseline: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    streamed: bool | Literal["auto"] = "auto",
    batch_size: int = 1,
    num_fewshot: int | None = None,
    task_path: Sequence[str | Path] = (),
    seed: int | None = None,
    trust_remote_code: bool = False,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures a checkpoint, compressed or not, as `mctk eval` does.

    Args:
        model: A model directory or a name on the hub.
        perplexity: Texts, as `evaluate.perplexity` of a recipe has them:
            [{"dataset": "wikitext2"}, {"text": "mine/*.jsonl", "length": 512}].
        tasks: lm-eval tasks.
        limit: Documents of each task; all by default.
        baseline: Measured as well, on the same tokens.
        device: "auto" (a GPU where there is one), "cpu", "cuda:0" ...
        dtype: Of computation; "auto" is the checkpoint's.
        streamed: Whether one decoder layer is in memory at a time; "auto": if the model does not
            fit. Tasks need the whole model.
        batch_size: Windows, or a task's requests, at a time.
        num_fewshot: Examples in a task's prompt; by default each task's own number.
        task_path: Directories with lm-eval tasks of one's own.
        seed: Of few-shot examples and of the bootstrap.
        trust_remote_code: Whether code that comes with a model may run.
        report: Is called with what is being done, how much of it is done, how much there is.

    Returns:
        "model" and, if asked for, "baseline": "perplexity" and "tasks" by name, "mode", "seconds"
        and more. With a baseline also "paired": by text, the change of the log-perplexity in nats
        a token with its 95 % interval (paired bootstrap).

    Raises:
        UserError: A model, text or task is not there, or does not fit.
    """
    from .checkpoint import open_source
    from .evaluate import compare as paired
    from .evaluate import evaluate_model
    from .recipe import Evaluate
    from .recipe.load import check_keys, validate
    from .recipe.source import RecipeSource

    source = RecipeSource({"perplexity": [*perplexity], "tasks": [*tasks], "limit": limit})
    check_keys(source, source.data, Evaluate, ())
    section = validate(source, Evaluate, source.data, (), strict_json=False)
    found: dict[str, Any] = {}
    for side, place in (("model", model), ("baseline", baseline)):
        if place is None:
            continue
        opened = open_source(place)
        prefix = f"{side}: " if baseline is not None else ""
        found[side] = evaluate_model(
            opened.path,
            section,
            device=device,
            dtype=dtype,
            streamed=streamed,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            num_fewshot=num_fewshot,
            task_path=task_path,
            seed=seed,
            report=_prefixed(report, prefix),
        )
        found[side] |= {"model": str(place), "commit": opened.commit}
    if baseline is not None:
        found["paired"] = paired(found["baseline"], found["model"], seed=seed or 0)
    return found


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Loads a checkpoint, compressed or not, by the class that its config.json names.

    Models that also see or hear come whole; by `AutoModelForCausalLM` some would lose the rest.

    Args:
        model: A model directory, or a name on the hub: owner/name, owner/name@revision.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Whether code that comes with the model may run.
        **options: For `from_pretrained`: dtype, device_map ...

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        UserError: There is no such model.
        CheckpointError: It is damaged, of an unknown type, or needs code that is not trusted.
    """
    from .checkpoint import open_source
    from .models import auto_class, load_config
    from .runtime import register, restore_buffers

    register()
    source = open_source(model, revision)
    config = load_config(source.path, source.config, trust_remote_code)
    loaded: PreTrainedModel = auto_class(config).from_pretrained(
        str(source.path), trust_remote_code=trust_remote_code, **options
    )
    restore_buffers(loaded)  # transformers leaves those of remote code uninitialised
    return loaded.eval()


def _registry() -> Registry:
    from .registry import load_plugins

    return load_plugins()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a recipe's file would give them: paths are text, tuples lists."""
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def _prefixed(
    report: Callable[[str, int, int], None] | None, prefix: str
) -> Callable[[str, int, int], None] | None:
    if report is None:
        return None
    return lambda what, done, total: report(prefix + what, done, total)


def _recipe(
    recipe: RecipeLike,
    registry: Registry,
    keys: dict[str, Any],
    single: Mapping[str, Any] | None,
) -> Recipe:
    """A checked recipe with what a call says in place of the recipe's own keys.

    Args:
        recipe: As in `compress`.
        registry: The plugins.
        keys: Top-level keys; None takes the key away, but for model and output leaves the recipe's.
        single: Keys as `--set` names them.
    """
    from .recipe import load_recipe
    from .recipe.source import RecipeSource, key_path

    source = RecipeSource(recipe)
    for key, value in _plain(single or {}).items():
        source.set(key_path(key), value, f"set {key}={value!r}")
    for key, value in _plain(keys).items():
        if value is not None or key not in ("model", "output"):
            source.set((key,), value, f"{key}={value!r}")
    return load_recipe(source, (), registry)
