"""Comparison files: rows, budgets and seeds in YAML; each row becomes an ordinary recipe.

Mistakes are placed as in recipes: file, line, key and the nearest valid name, whether they stand in
the comparison's file or in a recipe that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RecipeError, UserError
from ..hookspecs import STAGES
from ..recipe import Recipe, load_recipe
from ..recipe.load import check_keys, validate
from ..recipe.source import AssembledSource, KeyPath, Part, RecipeSource, key_path
from ..registry import Registry
from .result import Budget
from .schema import ComparisonFile

# What all rows share, and where a recipe has the same key.
SHARED = (
    "model", "revision", "trust_remote_code", "device", "dtype", "storage_dtype", "calibration",
    "evaluate", "gate",
)  # fmt: skip
# What a row takes from the recipe that it names.
FROM_RECIPE = ("steps", "allocate", "storage_dtype")
# What the recipes of one command line must agree in, since one calibration serves them all.
AGREE = ("model", "revision", "trust_remote_code", "dtype", "seed", "calibration")


@dataclass(frozen=True)
class RowSpec:
    """One row to be made: a recipe with its place in the comparison.

    Attributes:
        entry: Number of the file's row.
        name: Its name.
        label: What tables call it.
        recipe: What to run; its output is not yet the row's.
        budget: What it is asked; None if its steps say their sizes.
        seed: Of the calibration.
        settled: Whether the file says what its budget counts.
    """

    entry: int
    name: str
    label: str
    recipe: Recipe
    budget: Budget | None
    seed: int
    settled: bool

    @property
    def undecided(self) -> bool:
        """Whether it is left to the row's terms what its budget counts."""
        return self.budget is not None and not self.settled and self.budget.unit == "parameters"

    def called(self, budget: Budget | None) -> tuple[str, str]:
        """Name and label of the row that has come to stand at a budget.

        A budget of elements is none for a row whose elements are bits: it then stands by its bytes,
        apart from the others, and its name says what was removed before.
        """
        if self.budget is None or budget is not None:
            return self.name, self.label
        share = f" −{100 * self.budget.remove:g} %"
        return self.name + share, self.label + share


class LoadedComparison:
    """A comparison's file with the recipes of its rows.

    Attributes:
        name: The file's name, without its suffix.
        settings: What the file says.
        rows: All rows, in the order of the file, then of budgets, then of seeds.
    """

    def __init__(
        self, source: RecipeSource, settings: ComparisonFile, registry: Registry, name: str
    ) -> None:
        self.name, self.settings = name, settings
        self._source, self._registry = source, registry
        self._recipes = [self._recipe_source(index) for index in range(len(settings.rows))]
        self._names = self._named()
        self._commit: str | None = None
        self.rows = [
            self.row(index, budget, seed)
            for index in range(len(settings.rows))
            for budget in self._budgets(index)
            for seed in settings.seeds
        ]

    @property
    def output(self) -> Path:
        """The comparison's directory."""
        return Path(self.settings.output).expanduser()

    @property
    def budgets(self) -> list[Budget]:
        """The comparison's budgets."""
        return self.settings.budgets.each if self.settings.budgets else []

    def published(self) -> str:
        """The file with the command line's changes, for others to read: no private paths."""
        return self._source.published()

    def row(self, index: int, budget: Budget | None, seed: int) -> RowSpec:
        """A row's recipe at a budget.

        Args:
            index: Number of the file's row.
            budget: What it may store.
            seed: Of the calibration.

        Raises:
            RecipeError: Something is wrong with it, at its place.
        """
        entry = self.settings.rows[index]
        recipe = load_recipe(self._assemble(index, budget, seed), (), self._registry)
        if self._commit is not None:
            recipe = recipe.on_hub(recipe.model, self._commit)
        name = self._names[index]
        own = entry.budgets is not None and entry.budgets != "none"
        settled = entry.unit is not None or (own and entry.unit is None and self._says_unit(index))
        return RowSpec(index, name, entry.label or name, recipe, budget, seed, settled)

    def pin(self, commit: str) -> None:
        """Takes the hub model of all rows as it was at a commit."""
        self._commit = commit
        self.rows = [
            replace(row, recipe=row.recipe.on_hub(row.recipe.model, commit)) for row in self.rows
        ]

    def in_bytes(self, row: RowSpec) -> RowSpec:
        """The same row with a budget that counts bytes."""
        assert row.budget is not None
        budget = Budget(row.budget.remove, row.budget.of, "bytes")
        return self.row(row.entry, budget, row.seed)

    def _says_unit(self, index: int) -> bool:
        written = self._source.data["rows"][index].get("budgets")
        return isinstance(written, dict) and "unit" in written

    def _recipe_source(self, index: int) -> RecipeSource | None:
        named = self.settings.rows[index].recipe
        if named is None:
            return None
        written = Path(named).expanduser()
        root = self._source.file.resolve().parent if self._source.file else Path()
        beside = root / written
        try:
            return RecipeSource(beside if beside.is_file() else written)
        except RecipeError as error:
            if beside.is_file() or written.is_file():
                raise
            raise self._source.error(
                ("rows", index, "recipe"), f"there is no file {named}"
            ) from error

    def _named(self) -> list[str]:
        names: list[str] = []
        for index, entry in enumerate(self.settings.rows):
            source = self._recipes[index]
            if entry.name:
                name = entry.name
            elif source is not None and source.file is not None:
                name = source.file.stem
            else:
                name = "+".join(_methods(entry.steps))
            place: KeyPath = ("rows", index, *(["name"] if entry.name else []))
            if not name:
                raise self._source.error(place, "give the row a name")
            if "/" in name or "\\" in name:
                raise self._source.error(
                    place, f"'{name}' names a directory: write what has a slash as label"
                )
            if name in names:
                raise self._source.error(
                    place, f"two rows are called '{name}'; give one another name"
                )
            names.append(name)
        return names

    def _budgets(self, index: int) -> Sequence[Budget | None]:
        entry = self.settings.rows[index]
        if entry.budgets == "none":
            return [None]
        if entry.budgets is not None:
            found = entry.budgets.each
        elif self.settings.budgets is not None:
            if entry.unit is None and self._says_sizes(index):
                return [None]
            found = self.settings.budgets.each
        else:
            source = self._recipes[index]
            own = source.data.get("budget") if source is not None else None
            if own is None:
                return [None]
            recipe = load_recipe(self._assemble(index, None, 0, own=True), (), self._registry)
            assert recipe.budget is not None
            found = [Budget(round(1 - recipe.budget.kept, 9), recipe.budget.of, recipe.budget.unit)]
        if entry.unit is not None:
            found = [Budget(budget.remove, budget.of, entry.unit) for budget in found]
        return found

    def _says_sizes(self, index: int) -> bool:
        """Whether a row's steps need no budget: they say their sizes, or take none."""
        try:
            load_recipe(self._assemble(index, None, 0), (), self._registry)
        except RecipeError:
            return False  # it wants one, or is wrong: then it is refused with its budget as well
        return True

    def _assemble(
        self, index: int, budget: Budget | None, seed: int, own: bool = False
    ) -> AssembledSource:
        """A row's recipe, put together from the comparison's file and the recipe that it names.

        Args:
            index: Number of the file's row.
            budget: To be put in; None for none.
            seed: To be put in.
            own: Take the named recipe's own budget instead.
        """
        top, named = self._source, self._recipes[index]
        place: KeyPath = ("rows", index)
        entry = top.data["rows"][index]
        parts = {key: Part(top.data[key], top, (key,)) for key in SHARED if key in top.data}
        if "allocate" in top.data:
            parts["allocate"] = Part(top.data["allocate"], top, ("allocate",))
        if named is not None:
            taken = [*FROM_RECIPE, *(["budget"] if own else [])]
            for key in taken:
                if key in named.data and not (key == "storage_dtype" and key in parts):
                    parts[key] = Part(named.data[key], named, (key,))
        for key in ("steps", "allocate"):
            if entry.get(key) is not None:
                parts[key] = Part(entry[key], top, (*place, key))
        where: KeyPath = ("budgets",) if entry.get("budgets") is None else (*place, "budgets")
        if budget is not None:
            value = {"remove": budget.remove, "of": budget.of, "unit": budget.unit}
            parts["budget"] = Part(value, top, where)
        elif not own:
            parts.pop("allocate", None)  # there is nothing to share out
        parts["seed"] = Part(seed, top, ("seeds",))
        source = AssembledSource(parts, (top, place))
        for key, value in (entry.get("set") or {}).items():
            self._set(source, index, key, value)
        return source

    def _set(self, source: AssembledSource, index: int, key: str, value: Any) -> None:
        place: KeyPath = ("rows", index, "set", key)
        path = key_path(key)
        if path[0] not in ("steps", "allocate", "storage_dtype"):
            raise self._source.error(
                place, "a row may change its steps, allocate and storage_dtype only"
            )
        try:
            source.set(path, value, f"rows.{index}.set.{key}")
        except UserError as error:
            raise self._source.error(place, str(error)) from error


def load_comparison(
    files: Sequence[str | Path] | Mapping[str, Any],
    overrides: Iterable[str] = (),
    registry: Registry | None = None,
    remove: Sequence[float] | None = None,
    **flags: Any,
) -> LoadedComparison:
    """Reads and checks a comparison, without loading torch.

    Args:
        files: One comparison file, or recipes, each of which becomes a row; or a file's content.
        overrides: `--set` assignments.
        registry: Plugins; the installed ones by default.
        remove: Shares to remove, in the place of the file's budgets.
        **flags: Top-level keys of the command line; None means not given.

    Raises:
        UserError: For the first mistake, with file, line and key where it has one.
    """
    from ..registry import load_plugins

    registry = load_plugins() if registry is None else registry
    sources = [RecipeSource(files)] if isinstance(files, Mapping) else [*map(RecipeSource, files)]
    if not sources:
        raise UserError("give a comparison's file, or recipes")
    source = sources[0]
    together = [s for s in sources if "rows" in s.data]
    if together and len(sources) > 1:
        raise UserError(f"{together[0].file}: is a comparison's file; it is given alone")
    if not together:
        recipes = [
            load_recipe(s.file or s, (), registry, model=flags.get("model")) for s in sources
        ]
        source = _of_recipes(sources, recipes)
    source.override(overrides)
    if remove:
        source.set(("budgets", "remove"), list(remove), "--remove")
        if not together and "of" not in source.data["budgets"]:
            source.data["budgets"] |= _definition(sources)
    for key, value in flags.items():
        if value is not None:
            source.set((key,), value, f"--{key.replace('_', '-')}")
    name = source.file.stem if source.file else "comparison"
    if not together and len(sources) > 1:
        name = "-".join(s.file.stem for s in sources if s.file)[:80]
    data = {"output": str(Path("runs") / name), **source.data}
    check_keys(source, data, ComparisonFile, ())
    root = source.file.resolve().parent if source.file else None
    settings = validate(source, ComparisonFile, data, (), {"root": root}, strict_json=False)
    return LoadedComparison(source, settings, registry, name)


def _of_recipes(sources: list[RecipeSource], recipes: list[Recipe]) -> RecipeSource:
    """The comparison whose rows are these recipes; model and calibration are the first one's."""
    first = recipes[0]
    for recipe in recipes[1:]:
        for key in AGREE:
            if getattr(recipe, key) != getattr(first, key):
                raise recipe.error(
                    (key,), f"differs from {first.file}; the rows of a comparison share it"
                )
    source = sources[0]
    parts = {key: Part(source.data[key], source, (key,)) for key in SHARED if key in source.data}
    parts.pop("storage_dtype", None)  # each row's own
    rows = [{"recipe": str(s.file.resolve()) if s.file else ""} for s in sources]
    parts["rows"] = Part(rows, source, ())
    parts["seeds"] = Part([first.seed], source, ("seed",))
    return AssembledSource(parts, (source, ()))


def _definition(sources: list[RecipeSource]) -> dict[str, Any]:
    """What the recipes' own budgets are of, for shares that the command line gives.

    Raises:
        RecipeError: They do not agree.
    """
    found: dict[str, Any] = {}
    for source in sources:
        budget = source.data.get("budget") or {}
        own = {key: budget[key] for key in ("of", "unit") if key in budget}
        if budget and found and own != found:
            raise source.error(("budget",), "the recipes' budgets are of different things")
        found = own or found
    return found


def _methods(steps: Any) -> list[str]:
    """Names of the steps' methods, as far as they are written well."""
    keys = [stage for stage in STAGES if stage != "allocate"]
    listed = steps if isinstance(steps, list) else []
    named = [step for step in listed if isinstance(step, dict)]
    return [str(step[key]) for step in named for key in keys if key in step]
