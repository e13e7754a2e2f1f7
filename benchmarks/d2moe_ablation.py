"""What each choice in D²-MoE is worth on the demo models, at equal stored parameters.

    OMP_NUM_THREADS=1 python benchmarks/d2moe_ablation.py --model demo --remove 0.4,0.6

Every row is recipes/d2moe_demo.yaml with one thing changed, at every budget. All rows run as one
set, so that they share the sweeps over the calibration text; a row that cannot run is named with
its reason. Called again with the same `--out`, what is finished is taken up as it is. Tables go to
standard output, in Markdown:

- *perplexity*: geometric mean over the four test texts, as many windows of each;
- *log-perplexity*: its change against the recipe as it is, with a paired bootstrap over windows;
- *stored*: parameters in the experts, of the original's;
- *layer error*: relative squared error of a layer's output on calibration text, mean of layers;
- *lost*: what a rank cuts off: its share of the energy that gate and up put out for an expert's own
  tokens (down as well where its moment is taken of what enters), mean of layers and banks.

The last table is about what merges leave: the residuals' share of that energy before any rank is
cut, and the mean rank that holds 90 % of what is left, of the full rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from mctk import decompose
from mctk.engine import Reporter, run
from mctk.engine.calibrate import cache_context
from mctk.engine.compress import size_from_record
from mctk.engine.prepare import Preparation
from mctk.engine.run import read_calibration
from mctk.errors import UserError
from mctk.evaluate import paired_bootstrap
from mctk.linalg import loss, metric_svd
from mctk.models import read_banks
from mctk.plan import Plan, make_plan
from mctk.recipe import Recipe, load_recipe
from mctk.registry import Registry, load_plugins
from mctk.report import Column, Table
from mctk.report.tables import fixed, percent, scientific
from mctk.statistics import StatisticsCache, cache_directory
from mctk.sweep import StreamedModel
from mctk.terms import DENSE, Bank
from scipy.stats import spearmanr

RECIPE = Path(__file__).parents[1] / "recipes" / "d2moe_demo.yaml"
MODELS = {"demo": "demo/model", "fine": "demo/model_fine"}
MERGE, DECOMPOSE, PRUNE = range(3)  # the recipe's steps
MOST = 0.9  # of a residual's energy


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of the recipe: by step the keys that change (None: no such step); the allocator."""

    name: str
    changes: dict[int, dict[str, Any] | None] = dataclasses.field(default_factory=dict)
    allocate: str = "uniform"


def merge(name: str, method: str = "fisher", **options: Any) -> Row:
    """A row with another merge."""
    return Row(name, {MERGE: {"merge": method, "options": options}})


def delta(name: str, **options: Any) -> Row:
    """A row with other options of the decomposition."""
    return Row(name, {DECOMPOSE: {"options": {"storage": "pivoted", **options}}})


def prune(name: str, **options: Any) -> Row:
    """A row that prunes otherwise."""
    return Row(name, {PRUNE: {"options": options}})


def alone(name: str, method: str, storage: str = "pivoted", allocate: str = "uniform") -> Row:
    """A row that decomposes the experts themselves."""
    step = {"decompose": method, "options": {"storage": storage}}
    return Row(name, {MERGE: None, DECOMPOSE: step, PRUNE: None}, allocate)


REFERENCE = Row("the recipe")
GROUPS = {
    "merge": [
        merge("fisher: F alone", frequency=False),
        merge("fisher: labels of the model", labels="model"),
        merge("fisher, aligned", align=True),
        merge("frequency", "frequency"),
        merge("regmean", "regmean"),
        merge("ties", "ties"),
        merge("mean", "mean"),
        merge("mean, aligned", "mean", align=True),
        merge("random", "random"),
    ],
    "decompose": [
        Row("plain SVD", {DECOMPOSE: {"decompose": "svd"}}),
        delta("V shared", share="v"),
        delta("both shared", share="both"),
    ],
    "prune": [
        Row("none", {PRUNE: None}),
        prune("static 10 %", static=0.1),
        prune("static 5 %, dynamic 5 %", static=0.05, dynamic=0.05),
    ],
    "bases": [
        merge("2, by weight", bases=2),
        merge("2, by output", bases=2, similarity="output"),
        merge("4, by weight", bases=4),
        merge("4, by output", bases=4, similarity="output"),
        merge("auto", bases="auto", storage="pivoted"),
    ],
    "storage": [delta("plain", storage="plain")],
    "allocate": [
        Row("by_loss", allocate="by_loss"),
        Row("by_loss, prune too", {PRUNE: {"size": "auto", "options": {}}}, "by_loss"),
    ],
    "rivals": [
        alone("svd", "svd"),
        alone("svd_llm", "svd_llm"),
        alone("svd_llm, plain storage", "svd_llm", "plain"),
        alone("svd_llm, by_loss", "svd_llm", allocate="by_loss"),
    ],
}
# The second model is there for the number of bases.
FINE = {
    "merge": [row for row in GROUPS["merge"] if row.name in ("fisher, aligned", "mean", "random")],
    "bases": [*GROUPS["bases"], merge("8, by weight", bases=8)],
    "allocate": GROUPS["allocate"],
    "rivals": GROUPS["rivals"],
}


@dataclasses.dataclass
class Result:
    """A row at a budget, in the table `group`: planned, and what came of it.

    Attributes:
        plan: None if there is none.
        failed: Why there are no figures.
        figures: Cells by column.
        nll: Negative log-likelihood of every window of all texts.
        tokens: Predicted tokens of every window.
    """

    row: Row
    group: str
    plan: Plan | None = None
    failed: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    nll: list[float] = dataclasses.field(default_factory=list)
    tokens: list[float] = dataclasses.field(default_factory=list)


def read_recipe(
    row: Row, group: str, remove: float, options: argparse.Namespace, registry: Registry
) -> Recipe:
    """Returns a row's recipe."""
    given = yaml.safe_load(RECIPE.read_text())
    steps = [
        step | (row.changes.get(number) or {})
        for number, step in enumerate(given["steps"])
        if row.changes.get(number, {}) is not None
    ]
    for text in given["evaluate"]["perplexity"]:
        text["windows"] = options.windows
    if options.sequences:
        given["calibration"]["sequences"] = options.sequences
    place = re.sub(r"[^a-z0-9_]+", "-", f"{100 * remove:g} {group} {row.name}".lower())
    return load_recipe(
        RECIPE,
        registry=registry,
        model=MODELS.get(options.model, options.model),
        output=options.out / Path(options.model).name / place,
        calibration=given["calibration"],
        budget={"remove": remove, "of": "experts"},
        allocate={"method": row.allocate},
        steps=steps,
        evaluate=given["evaluate"],
        gate=False,
    )


def plan_rows(options: argparse.Namespace, registry: Registry) -> dict[float, list[Result]]:
    """Plans every row at every budget, so that one that is impossible spoils no other."""
    groups = FINE if options.model == "fine" else GROUPS
    if options.only:
        groups = {options.only: groups[options.only]}
    rows = [(REFERENCE, "all"), *((row, name) for name, rows in groups.items() for row in rows)]
    found: dict[float, list[Result]] = {}
    model: StreamedModel | None = None
    for remove in options.remove:
        for row, group in rows:
            result = Result(row, group)
            found.setdefault(remove, []).append(result)
            try:
                recipe = read_recipe(row, group, remove, options, registry)
                result.plan = make_plan(recipe, registry, model=model)
                model = result.plan.model
            except UserError as error:
                result.failed = str(error)
    return found


def run_rows(results: list[Result], options: argparse.Namespace, registry: Registry) -> None:
    """Runs all rows as one set; if one of them stops it, each by itself."""
    ready = [result for result in results if result.plan is not None]
    try:
        run_set(ready, options, registry)
    except UserError as error:
        print(f"the set stopped ({error}); now its rows one by one", file=sys.stderr)
        for result in ready:
            try:
                run_set([result], options, registry)
            except UserError as reason:
                result.failed = str(reason)


def run_set(results: list[Result], options: argparse.Namespace, registry: Registry) -> None:
    """Runs rows as one set and takes up their figures."""
    plans = [result.plan for result in results if result.plan is not None]
    recipes = [plan.recipe for plan in plans]
    every = run(recipes, registry, cache=options.cache, reporter=Reporter(quiet=options.quiet))
    for result, plan, metrics in zip(results, plans, every, strict=True):
        before, texts = (
            metrics["evaluation"][side]["perplexity"].values()
            for side in ("original", "compressed")
        )
        result.nll = [value for text in texts for value in text["window_nll"]]
        result.tokens = [t["tokens"] / t["windows"] for t in texts for _ in t["window_nll"]]
        ends = [layer["trace"][-1]["layer_error"] for layer in metrics["layers"] if layer["trace"]]
        result.figures |= {
            "perplexity": math.exp(statistics.fmean(text["nll"] for text in texts)),
            "original": math.exp(statistics.fmean(text["nll"] for text in before)),
            "stored": metrics["budget"]["attained"] / plan.scope,
            "layer_error": statistics.fmean(ends),
        }


def statistics_of(plan: Plan, directory: Path) -> StatisticsCache:
    """Opens what the runs have measured on the calibration text."""
    windows, calibration = read_calibration(plan), plan.recipe.calibration
    assert windows is not None and calibration is not None
    fingerprint = plan.source.fingerprint(directory)
    context = cache_context(plan.model, fingerprint, windows.digest, calibration.batch)
    return StatisticsCache(directory, context)


def look(result: Result, cache: StatisticsCache) -> None:
    """Adds what a rank takes and leaves, for a row that cuts it in each expert's own metric."""
    plan = result.plan
    assert plan is not None
    number = next(n for n, s in enumerate(plan.recipe.steps) if s.stage == "decompose")
    options = plan.recipe.steps[number].options
    own = (
        isinstance(options, decompose.MomentOptions) and getattr(options, "share", "none") == "none"
    )
    if not own or plan.prepared < number:
        return
    state = json.loads((plan.recipe.output / ".mctk" / "manifest.json").read_text())
    sizes = size_from_record(state["sizes"])
    preparation = Preparation.of(plan, cache)
    found = []
    for layer, names in plan.targets[number].items():
        values = preparation.statistics(layer)
        with plan.model.layer(layer) as module:
            original = read_banks(module, layer)
            prepared = preparation.banks(layer, original)
            for name in names:
                need = decompose.moment_need(name, original[name].shape)
                if need.side == "input":
                    bank = (prepared[0] if prepared else original)[name]
                    found.append(shares(bank, values[need].value, sizes[number, layer, name]))
    means = [statistics.fmean(column) for column in zip(*found, strict=True)]
    result.figures |= dict(zip(("residual", "rank", "lost"), means, strict=False))


def shares(bank: Bank, moment: torch.Tensor, rank: int | None) -> tuple[float, float, float]:
    """The residuals' share of the energy, the rank of most of it, and what a rank loses.

    Args:
        bank: As the decomposition finds it.
        moment: Of what enters, for each expert ``[E, in, in]``.
        rank: Where it is cut.
    """
    energy = left = lost = 0.0
    ranks = []
    for e, residual in enumerate(decompose.matrices(bank).weight):
        weight = bank.materialise(e)[0]
        assert weight is not None
        energy += loss(weight, torch.zeros_like(weight), moment[e])
        spectrum = metric_svd(residual, input_moment=moment[e]).spectrum
        whole = float(spectrum.sum())
        left += whole
        lost += 0.0 if rank in (None, DENSE) else float(spectrum[rank:].sum())
        if whole:  # an expert alone in its cluster leaves nothing
            ranks.append((int((spectrum.cumsum(0) < MOST * whole).sum()) + 1) / len(spectrum))
    return left / energy, statistics.fmean(ranks), lost / energy


def change(result: Result, reference: Result) -> str:
    """The change of log-perplexity against the reference row, with its interval."""
    if result is reference or not reference.nll:
        return ""
    value, low, high = paired_bootstrap(reference.nll, result.nll, reference.tokens)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def show(found: dict[float, list[Result]]) -> None:
    """Prints the tables, and which rows are missing and why."""
    columns = [
        Column("row", "", left=True),
        Column("perplexity", "perplexity", fixed(2)),
        Column("change", "log-perplexity"),
        Column("stored", "stored", percent),
        Column("layer_error", "layer error", scientific),
        Column("lost", "lost", percent),
    ]
    for remove, results in found.items():
        reference, *others = results
        done = [result for result in results if result.figures]
        for result in done:
            result.figures |= {"row": result.row.name, "change": change(result, reference)}
        for group in dict.fromkeys(result.group for result in others):
            rows: list[Mapping[str, Any]] = [
                r.figures for r in done if r is reference or r.group == group
            ]
            print(f"**{group}**, {100 * remove:g} % removed\n")
            print(Table(columns, rows).markdown() + "\n")
        if done:
            print(f"Perplexity of the original: {done[0].figures['original']:.2f}")
        for figure in ("layer_error", "lost"):
            pairs = [
                (r.figures[figure], r.figures["perplexity"]) for r in done if figure in r.figures
            ]
            if len(pairs) > 2:
                rank = spearmanr(*zip(*pairs, strict=True)).statistic
                print(f"Rank correlation of {figure} and perplexity, {len(pairs)} rows: {rank:.2f}")
        for result in results:
            if result.failed:
                print(f"{result.group}, {result.row.name}: no figures, {result.failed}")
        print()
    seen: dict[str, Mapping[str, Any]] = {
        r.row.name: r.figures
        for r in next(iter(found.values()))
        if "residual" in r.figures and r.group in ("all", "merge", "bases", "rivals")
    }
    print("What is left for the low-rank part\n")
    columns = [
        columns[0],
        Column("residual", "share of the energy", percent),
        Column("rank", f"rank for {100 * MOST:g} % of it", percent),
    ]
    print(Table(columns, list(seen.values())).markdown())


def main() -> None:
    """Plans, runs, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, fine, or a model's directory")
    parser.add_argument("--remove", default="0.4", help="shares of the experts, with commas")
    parser.add_argument("--only", choices=GROUPS, help="one group of rows")
    parser.add_argument("--windows", type=int, default=16, help="of each text")
    parser.add_argument("--sequences", type=int, help="of calibration; by default the recipe's")
    parser.add_argument("--out", type=Path, default=Path("runs/d2moe_ablation"))
    parser.add_argument("--cache", type=Path, help="of statistics; by default mctk's own")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args()
    options.remove = [float(part) for part in options.remove.split(",")]
    options.cache = cache_directory(options.cache)
    registry = load_plugins()
    found = plan_rows(options, registry)
    every = [result for results in found.values() for result in results]
    run_rows(every, options, registry)
    done = [result for result in every if result.figures]
    if done and done[0].plan is not None:
        cache = statistics_of(done[0].plan, options.cache)
        for result in done:
            look(result, cache)
    show(found)


if __name__ == "__main__":
    main()
