"""From a file and the command line to a checked `Recipe`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mctk.contract import implements
from mctk.errors import UserError, nearest
from mctk.hookspecs import STAGES, Method
from mctk.hub import HubError, looks_local, near_directory, split_revision
from mctk.recipe.schema import Recipe, Step
from mctk.recipe.source import KeyPath, RecipeSource
from mctk.registry import Registry, load_plugins

DEFAULT_ALLOCATE = "uniform"
_STEP_STAGES = tuple(stage for stage in STAGES if stage != "allocate")
_STEP_KEYS = (*_STEP_STAGES, *(key for key in Step.model_fields if key != "method"))


def load_recipe(
    origin: str | Path | Mapping[str, Any] | RecipeSource,
    overrides: Iterable[str] = (),
    registry: Registry | None = None,
    **flags: Any,
) -> Recipe:
    """Reads and checks a recipe, without loading torch.

    Args:
        origin: A YAML file, or the same content as a mapping or as a source.
        overrides: `--set` assignments such as "budget.remove=0.3", applied in order.
        registry: Plugins to take methods from; the installed ones by default.
        **flags: Top-level keys given on the command line, e.g. output or device; they come after
            overrides, and None means not given.

    Raises:
        RecipeError: For the first mistake, with file, line and key.
    """
    source = origin if isinstance(origin, RecipeSource) else RecipeSource(origin)
    source.override(overrides)
    for key, value in flags.items():
        if value is not None:
            value = str(value) if isinstance(value, Path) else value
            source.set((key,), value, f"--{key.replace('_', '-')}")
    registry = load_plugins() if registry is None else registry

    data = dict(source.data)
    if "rows" in data:
        raise source.error(("rows",), "is a key of comparisons; `mctk compare` takes their files")
    check_keys(source, data, Recipe, ())
    data["steps"] = [
        _step(source, registry, step, index) for index, step in enumerate(_steps(source, data))
    ]
    _default_allocate(data)
    if "allocate" in data:
        data["allocate"] = _allocate(source, registry, data["allocate"])
    data.setdefault("output", str(Path("runs") / (source.file.stem if source.file else "recipe")))
    root = source.root
    recipe = validate(source, Recipe, data, (), context={"root": root}, strict_json=False)
    recipe._source = source
    _check_sizes(recipe)
    _check_allocate(recipe)
    return _resolve_model(recipe, root)


def _steps(source: RecipeSource, data: dict[str, Any]) -> list[Any]:
    steps = data.get("steps")
    if not isinstance(steps, list) or not steps:
        raise source.error(("steps",), "give a list of steps, such as [{decompose: svd}]")
    return steps


def _step(source: RecipeSource, registry: Registry, step: Any, index: int) -> dict[str, Any]:
    """Turns `<stage>: <method>` into the method and parses its options."""
    path: KeyPath = ("steps", index)
    if not isinstance(step, dict):
        raise source.error(path, "a step is a mapping, such as {decompose: svd}")
    for key in step:
        if key == "allocate":
            raise source.error((*path, key), "allocate is no step; it is a key of the recipe")
        if key not in _STEP_KEYS:
            raise source.error((*path, key), f"unknown key{nearest(str(key), _STEP_KEYS)}")
    stages = [key for key in step if key in _STEP_STAGES]
    if len(stages) != 1:
        found = f"has two methods ({', '.join(stages)})" if stages else "names no method"
        raise source.error(
            (*path, *stages[1:2]),
            f"the step {found}; give one of {', '.join(_STEP_STAGES)}",
        )
    stage = stages[0]
    rest = {key: value for key, value in step.items() if key != stage}
    if isinstance(rest.get("size"), dict):
        model = Step.model_fields["size"].annotation
        check_keys(source, rest["size"], model_in(model), (*path, "size"))
    method = _method(source, registry, stage, step[stage], (*path, stage))
    options = _options(source, method, rest.get("options", {}), (*path, "options"))
    if method.takes_size is True and rest.get("size") is None:
        rest["size"] = "auto"
    return rest | {"method": method, "options": options}


def _default_allocate(data: dict[str, Any]) -> None:
    """A budget that names no allocator is shared out by the default one."""
    if data.get("budget") is not None and data.get("allocate") is None:
        data["allocate"] = {"method": DEFAULT_ALLOCATE}


def _allocate(source: RecipeSource, registry: Registry, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    path: KeyPath = ("allocate",)
    if not isinstance(value, dict):
        raise source.error(path, f"write {{method: {value}}}")
    for key in value:
        if key not in ("method", "options"):
            hint = nearest(str(key), ("method", "options"))
            raise source.error((*path, key), f"unknown key{hint}")
    name = value.get("method", DEFAULT_ALLOCATE)
    method = _method(source, registry, "allocate", name, (*path, "method"))
    options = _options(source, method, value.get("options", {}), (*path, "options"))
    return {"method": method, "options": options}


def _method(
    source: RecipeSource, registry: Registry, stage: str, name: Any, path: KeyPath
) -> Method:
    if not isinstance(name, str):
        raise source.error(path, f"should be a method's name, got {name!r}")
    try:
        return registry.method(stage, name)
    except UserError as error:
        raise source.error(path, str(error)) from error


def _options(source: RecipeSource, method: Method, given: Any, path: KeyPath) -> BaseModel:
    if not isinstance(given, dict):
        raise source.error(path, "should be a mapping of option to value")
    unknown = f"unknown option of {method.stage}/{method.name}"
    check_keys(source, given, method.Options, path, unknown)
    return validate(source, method.Options, given, path)


def check_keys(
    source: RecipeSource,
    data: dict[str, Any],
    model: type[BaseModel] | None,
    path: KeyPath,
    unknown: str = "unknown key",
) -> None:
    """Refuses keys that a model has not, with the nearest that it has; looks into models below."""
    if model is None:
        return
    for key, value in data.items():
        known = model.model_fields.get(key)
        if known is None:
            hint = nearest(key, model.model_fields) or " (it has none)"
            raise source.error((*path, key), unknown + hint)
        if path == () and key in ("steps", "allocate"):
            continue  # written otherwise than they are kept; checked with their methods
        below = model_in(known.annotation)
        for at, item in _mappings(value, (*path, key)):
            check_keys(source, item, below, at, unknown)


def _mappings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, dict):
                yield (*path, index), item


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in `Model`, `Model | None` or `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = model_in(part)
        if found is not None:
            return found
    return None


def validate(
    source: RecipeSource,
    model: type[Any],
    data: dict[str, Any],
    path: KeyPath,
    context: dict[str, Any] | None = None,
    strict_json: bool = True,
) -> Any:
    """Validates strictly and turns pydantic's first error, by line, into ours.

    Options go through JSON: there strict means no guessing between types, while paths, tuples and
    enumerations may still be written as text and lists.
    """
    try:
        if strict_json:
            return model.model_validate_json(json.dumps(data), strict=True)
        return model.model_validate(data, context=context)
    except ValidationError as error:
        explained: dict[KeyPath, list[str]] = {}
        for problem in error.errors(include_url=False):
            at: KeyPath = (*path, *_own_keys(problem, data))
            explained.setdefault(at, []).append(_explain(problem))
        # A value that may be of several types fails once for each of them.
        problems = [source.error(at, "; or ".join(said)) for at, said in explained.items()]
        raise min(problems, key=lambda problem: problem.line or 0) from error


def _own_keys(problem: Any, data: Any) -> tuple[Any, ...]:
    """The problem's keys as the recipe has them: pydantic adds the types that it tried."""
    keys: list[Any] = []
    for key in problem["loc"]:
        known = isinstance(data, dict) and key in data
        known |= isinstance(data, list) and isinstance(key, int) and key < len(data)
        if not known and not (problem["type"] == "missing" and isinstance(data, dict)):
            break
        keys.append(key)
        data = data[key] if known else None
    return tuple(keys)


def _explain(problem: Any) -> str:
    kind, message = problem["type"], problem["msg"]
    given, about = problem["input"], problem.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"should be a mapping, got {given!r}"
    message = re.sub("^(Input|List) should", "should", message)
    message += "" if isinstance(given, dict | list) else f", got {json.dumps(given, default=str)}"
    if kind == "literal_error" and isinstance(given, str):
        valid = re.findall(r"'([^']*)'", about["expected"])
        hint = nearest(given, valid)
        message += hint if hint.startswith(" (did") else ""
    return message


def _check_sizes(recipe: Recipe) -> None:
    for index, step in enumerate(recipe.steps):
        path, name = ("steps", index), f"{step.stage}/{step.method.name}"
        written = recipe._source.data["steps"][index].get("size")
        if step.size is None:
            continue
        if not step.method.takes_size:
            raise recipe.error((*path, "size"), f"{name} takes no size")
        if step.size.auto and recipe.budget is None:
            if written is None:
                what = f"{name} needs a size, such as {{keep: 0.6}}, or the recipe a budget"
                raise recipe.error(path, what)
            raise recipe.error((*path, "size"), "auto needs a budget, and the recipe has none")
    if recipe.budget is not None and not any(step.auto for step in recipe.steps):
        raise recipe.error(("budget",), "has no effect: no step takes its size from it")


def _check_allocate(recipe: Recipe) -> None:
    if recipe.allocate is None:
        return
    if recipe.budget is None:
        raise recipe.error(("allocate",), "has no effect without a budget")
    method = recipe.allocate.method
    if not method.needs_curves:
        return
    auto = [(index, step) for index, step in enumerate(recipe.steps) if step.auto]
    for index, step in auto:
        name = f"steps.{index} ({step.stage}/{step.method.name})"
        lacks = None
        if method.units == "squared_error" and step.method.units != "squared_error":
            lacks = f"compares squared errors, and {name} has only scores"
        elif method.units == "score" and step.method.units != "score":
            lacks = f"compares scores, and {name} has squared errors"
        elif not implements(step.method, "curve"):
            lacks = f"compares scores, and {name} gives none"
        elif method.units == "score" and step.method is not auto[0][1].method:
            lacks = f"compares scores of one method, and {name} is another than steps.{auto[0][0]}"
        if lacks is not None:
            raise recipe.error(
                ("allocate", "method"), f"'{method.name}' {lacks}; use {DEFAULT_ALLOCATE}"
            )


def _resolve_model(recipe: Recipe, root: Path | None) -> Recipe:
    """Finds a model directory beside the recipe or from here; anything else is a hub name.

    A name may end with `@revision`; a directory that is called so goes first.
    """
    written = Path(recipe.model).expanduser()
    for base in ([root] if root else []) + [Path()]:
        if (base / written).is_dir():
            if recipe.revision is not None:
                raise recipe.error(("revision",), "has no effect on a model directory")
            return recipe.model_copy(update={"model": str(base / written)})
    if looks_local(recipe.model):
        raise recipe.error(
            ("model",), f"there is no directory {recipe.model}{near_directory(recipe.model)}"
        )
    try:
        name, revision = split_revision(recipe.model)
    except HubError as error:
        raise recipe.error(("model",), str(error)) from error
    if revision is not None and recipe.revision is not None:
        raise recipe.error(("revision",), f"has no effect: model names {revision!r} already")
    return recipe.on_hub(name, revision or recipe.revision)
