"""What the ablation's table does not have: changes against the recipe, and what merges leave.

    mctk compare benchmarks/d2moe_ablation.yaml
    python benchmarks/d2moe_residuals.py runs/d2moe_ablation
    python benchmarks/d2moe_residuals.py runs/d2moe_ablation_fine --model recipes/demo/model_fine

First, for each budget, every row's mean layer error and its change of log-perplexity against the
first row, with a paired bootstrap over windows. Then, of rows that cut in each expert's own metric,
what a merge leaves: the residuals' share of the energy that gate and up put out for an expert's own
tokens (down's as well where its moment is taken of what enters), and the mean rank that holds 90 %
of what is left, of the full rank; from the statistics and prepared layers that the comparison left
in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mctk import decompose
from mctk.comparison.file import load_comparison
from mctk.engine.calibrate import cache_context
from mctk.engine.fate import Fate
from mctk.engine.prepare import Preparation
from mctk.engine.run import read_calibration
from mctk.evaluate import paired_bootstrap
from mctk.linalg import loss, metric_svd
from mctk.models import read_banks
from mctk.planning import Plan, make_plan
from mctk.registry import load_plugins
from mctk.report import Column, Table
from mctk.report.tables import fixed, percent, scientific
from mctk.statistics import StatisticsCache, cache_directory
from mctk.terms import Bank
from scipy.stats import spearmanr

FILE = Path(__file__).parent / "d2moe_ablation.yaml"
MOST = 0.9  # of a residual's energy


def windows(row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Negative log-likelihood and predicted tokens of every window of all texts."""
    nll = [value for text in row["texts"].values() for value in text["window_nll"]]
    tokens = [t["tokens"] / t["windows"] for t in row["texts"].values() for _ in t["window_nll"]]
    return nll, tokens


def print_changes(directory: Path) -> None:
    """A table for each budget."""
    found = json.loads((directory / "comparison.json").read_text(encoding="utf-8"))
    columns = [
        Column("row", "", left=True),
        Column("perplexity", "perplexity", fixed(2)),
        Column("change", "log-perplexity against the first"),
        Column("layer_error", "layer error", scientific),
    ]
    for remove in dict.fromkeys(row["budget"]["remove"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["budget"]["remove"] == remove]
        done = [row for row in rows if row["status"] == "ok"]
        reference, tokens = windows(done[0])
        shown: list[Mapping[str, Any]] = []
        for row in done:
            value, low, high = paired_bootstrap(reference, windows(row)[0], tokens)
            errors = [layer["trace"][-1]["layer_error"] for layer in layers(directory, row)]
            shown.append(
                {
                    "row": row["name"],
                    "perplexity": row["overall"]["perplexity"],
                    "change": f"{value:+.4f} [{low:+.4f}, {high:+.4f}]",
                    "layer_error": statistics.fmean(errors),
                }
            )
        print(f"{100 * remove:g} % removed\n\n{Table(columns, shown).markdown()}\n")
        pairs = [(row["layer_error"], row["perplexity"]) for row in shown]
        rank = spearmanr(*zip(*pairs, strict=True)).statistic
        print(f"Rank correlation of layer error and perplexity, {len(pairs)} rows: {rank:.2f}")
        for row in rows:
            if row["status"] != "ok":
                print(f"{row['name']}: {row['status']}: {row['reason']}")
        print()


def layers(directory: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's records of the layers that it changed."""
    file = directory / "rows" / row["key"] / "metrics.json"
    return [layer for layer in json.loads(file.read_text())["layers"] if layer["trace"]]


def left_by(plan: Plan, cache: StatisticsCache) -> tuple[float, float] | None:
    """Share of the energy that residuals have, and rank of most of it; None if not to be told."""
    number = next(n for n, s in enumerate(plan.recipe.steps) if s.stage == "decompose")
    options = plan.recipe.steps[number].options
    own = isinstance(options, decompose.MomentOptions)
    if not own or getattr(options, "share", "none") != "none" or plan.prepared < number:
        return None
    preparation = Preparation.of(plan, cache, Fate(plan.recipe.model_name, print))
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
                    found.append(shares(bank, values[need].value))
    return statistics.fmean(s for s, _ in found), statistics.fmean(r for _, r in found)


def shares(bank: Bank, moment: torch.Tensor) -> tuple[float, float]:
    """The residuals' share of the energy, and the rank of most of it.

    Args:
        bank: As the decomposition finds it.
        moment: Of what enters, for each expert ``[E, in, in]``.
    """
    energy = left = 0.0
    ranks = []
    for e, residual in enumerate(decompose.matrices(bank).weight):
        weight = bank.materialise(e)[0]
        assert weight is not None
        energy += loss(weight, torch.zeros_like(weight), moment[e])
        spectrum = metric_svd(residual, input_moment=moment[e]).spectrum
        whole = float(spectrum.sum())
        left += whole
        if whole:  # an expert alone in its cluster leaves nothing
            ranks.append((int((spectrum.cumsum(0) < MOST * whole).sum()) + 1) / len(spectrum))
    return left / energy, statistics.fmean(ranks)


def print_residuals(arguments: argparse.Namespace) -> None:
    """One table, of the rows at the first budget."""
    registry, directory = load_plugins(), cache_directory(arguments.cache)
    loaded = load_comparison([FILE], [], registry, model=arguments.model)
    first = loaded.rows[0].budget
    cache, model, shown = None, None, []
    for spec in loaded.rows:
        if spec.budget != first or spec.recipe.allocate.method.name != "uniform":
            continue
        plan = make_plan(spec.recipe, registry, model=model)
        model = plan.model
        if cache is None:
            drawn, calibration = read_calibration(plan), plan.recipe.calibration
            assert drawn is not None and calibration is not None
            fingerprint = plan.source.fingerprint(directory)
            context = cache_context(model, fingerprint, drawn.digest, calibration.batch)
            cache = StatisticsCache(directory, context)
        found = left_by(plan, cache)
        if found is not None:
            shown.append({"row": spec.name, "residual": found[0], "rank": found[1]})
    columns = [
        Column("row", "", left=True),
        Column("residual", "residual energy", percent),
        Column("rank", f"rank for {100 * MOST:g} % of it", percent),
    ]
    print(f"What is left for the low-rank part\n\n{Table(columns, shown).markdown()}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("comparison", type=Path, help="directory of the finished comparison")
    parser.add_argument("--model", help="its model, if it was not the file's")
    parser.add_argument("--cache", type=Path, help="of statistics; by default mctk's own")
    arguments = parser.parse_args()
    print_changes(arguments.comparison)
    print_residuals(arguments)


if __name__ == "__main__":
    main()
