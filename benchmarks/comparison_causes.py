"""What docs/comparison.md says of the causes: figures of the original, and of a comparison's rows.

    python benchmarks/comparison_causes.py                    # the demo model's inputs and outputs
    python benchmarks/comparison_causes.py runs/compare_demo  # and what pruned experts were worth
    python benchmarks/comparison_causes.py --statistics       # and FWSVD, and frequency (see below)

Of the original: how unequal the energy of the experts' inputs is, and how much of each expert's
output energy is variation about its mean, on the first calibration sequences of the comparison.
Of the rows that remove experts: which share of the calibration's tokens the removed ones had.

From the statistics that the comparison has left in the cache (`--cache` as it was given there):

- *FWSVD*: how unequal the weights of a matrix's inputs are, and what truncations at one rank lose,
  of what FWSVD minimises (squared errors of weights, each input's times its Fisher information) and
  of the outputs on each expert's own tokens;
- *frequency*: how unequal the experts' use is, and how NAEE's loss ranks the experts that frequency
  keeps among all choices of as many; their mean is what experts drawn at random lose.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mctk import decompose
from mctk.comparison.file import LoadedComparison, load_comparison
from mctk.data import TokenWindows, calibration_windows
from mctk.engine.calibrate import cache_context
from mctk.engine.fate import Fate
from mctk.engine.prepare import Preparation
from mctk.engine.run import read_calibration
from mctk.evaluate.loading import load_model, load_tokenizer
from mctk.linalg import loss, metric_svd
from mctk.models import find_layers, read_banks
from mctk.planning import make_plan
from mctk.registry import load_plugins
from mctk.report.tables import fixed, percent, scientific
from mctk.runtime import observe
from mctk.runtime.names import IMPLEMENTATION
from mctk.statistics import (
    ChannelFisher,
    ExpertFrequency,
    LayerStatistics,
    RoutedOutputs,
    StatisticsCache,
    cache_directory,
)
from mctk.terms import Bank, rank_settings
from mctk_naee.loss import SubsetLoss
from mctk_svd.math import ScaledSVD, fisher_weights
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.6  # of a matrix's parameters, where truncations are compared
KEPT = (6, 4)  # experts, where choices of them are compared


class ExpertSums:
    """Sums over what enters and leaves a layer's experts, in float64.

    Attributes:
        inputs: Σ x xᵀ over routed tokens, [H, H].
        count, total, square: Of each expert's outputs y: tokens, Σ y [H], Σ ‖y‖².
    """

    def __init__(self) -> None:
        self.inputs: torch.Tensor | float = 0.0
        self.count: dict[int, int] = {}
        self.total: dict[int, torch.Tensor] = {}
        self.square: dict[int, float] = {}

    def tap(self, expert: int, token, slot, x, h, y, weights) -> None:
        """See `mctk.runtime.Observer`."""
        x, y = x.double(), y.double()
        self.inputs = self.inputs + x.T @ x
        self.count[expert] = self.count.get(expert, 0) + y.shape[0]
        self.total[expert] = self.total.get(expert, 0.0) + y.sum(0)
        self.square[expert] = self.square.get(expert, 0.0) + float(y.square().sum())

    def variation(self, expert: int) -> float:
        """Share of an expert's output energy that is variation about its mean."""
        mean = float((self.total[expert] / self.count[expert]).square().sum())
        return 1 - self.count[expert] * mean / self.square[expert]


def measure(model: torch.nn.Module, windows: TokenWindows) -> list[ExpertSums]:
    """Runs the windows through the model and listens to every layer's experts."""
    model.set_experts_implementation(IMPLEMENTATION)
    sums = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in find_layers(model)[1]:
            sums.append(ExpertSums())
            stack.enter_context(observe(layer.mlp.experts, sums[-1].tap))
        for ids in windows.ids.split(4):
            model(ids)
    return sums


def print_original(sums: list[ExpertSums]) -> None:
    """Energy of inputs and variation of outputs, a line a layer."""
    print("layer  strongest/median channel  directions for 90 %  variation of outputs, least..most")
    for number, layer in enumerate(sums):
        energy = layer.inputs.diag()
        eigenvalues = torch.linalg.eigvalsh(layer.inputs).flip(0)
        shares = eigenvalues.cumsum(0) / eigenvalues.sum()
        varied = sorted(layer.variation(expert) for expert in layer.count)
        print(
            f"{number:5}  {fixed(1)(float(energy.max() / energy.median())):>24}  "
            f"{int((shares < 0.9).sum()) + 1:>8} of {len(shares):<8}  "
            + " ".join(percent(value) for value in varied)
        )


def print_rows(directory: Path) -> None:
    """The tokens that removed experts had, a line a row."""
    comparison = json.loads((directory / "comparison.json").read_text())
    print("\nshare of the calibration's (token, expert) pairs that went to removed experts")
    for row in comparison["rows"]:
        if not row["experts_kept"]:
            continue
        metrics = json.loads((directory / "rows" / row["key"] / "metrics.json").read_text())
        lost = total = 0
        for layer in metrics["layers"]:
            tokens = layer.get("tokens_per_expert")
            if not tokens:
                continue  # its method asked for no statistic that counts them
            kept = row["experts_kept"].get(str(layer["layer"]), range(len(tokens)))
            lost += sum(n for expert, n in enumerate(tokens) if expert not in kept)
            total += sum(tokens)
        print(f"{row['key']:40} {percent(lost / total if total else None)}")


def live_layers(
    loaded: LoadedComparison, row: str, cache: Path | None
) -> Iterator[tuple[LayerStatistics, dict[str, Bank]]]:
    """Yields each layer's statistics that a row asks for, the layer in memory, and its banks."""
    recipe = next(spec.recipe for spec in loaded.rows if spec.name == row)
    plan = make_plan(recipe, load_plugins())
    windows, directory = read_calibration(plan), cache_directory(cache)
    assert windows is not None and recipe.calibration is not None
    context = cache_context(
        plan.model,
        plan.source.fingerprint(directory),
        windows.digest,
        recipe.calibration.batch,
    )
    preparation = Preparation.of(plan, StatisticsCache(directory, context), Fate(row, print))
    for index in range(len(plan.sites)):
        with plan.model.layer(index) as module:
            yield preparation.statistics(index).bind(module), read_banks(module, index)


def rank_of(bank: Bank) -> int:
    """The rank whose factors, stored plain, keep at most `KEEP` of a bank's parameters."""
    ranks, costs = rank_settings(bank.shape, bank.shape.members, bank.shape.members, 8, "plain")
    return max(r for r, c in zip(ranks, costs, strict=True) if c <= KEEP * costs[-1] and r > 0)


def print_fisher(loaded: LoadedComparison, cache: Path | None) -> None:
    """Truncations by four metrics, the mean over experts, a line a layer and bank."""
    moments = live_layers(loaded, "svd_llm", cache)
    print(
        f"\ntruncated to {KEEP:.0%} of the parameters: weights of inputs; Fisher-weighted error of "
        "the weights; error of the outputs"
    )
    print("layer bank        most/median input   svd    fwsvd   |  svd    fwsvd   svd_llm")
    for (fisher, banks), (inputs, _) in zip(
        live_layers(loaded, "fwsvd", cache), moments, strict=True
    ):
        for name in ("experts.gate", "experts.up", "experts.down"):
            found = [
                compared(weight, information, moment, rank_of(banks[name]))
                for weight, information, moment in zip(
                    decompose.matrices(banks[name]).weight,
                    fisher[ChannelFisher(name, "input")],
                    moments_of(banks[name], inputs),
                    strict=True,
                )
            ]
            spread, *errors = (statistics.fmean(column) for column in zip(*found, strict=True))
            shown = [f"{scientific(error):>7}" for error in errors]
            print(
                f"{fisher.layer:5} {name:13} {fixed(2)(spread):>15}  {shown[0]} {shown[1]}   | "
                + " ".join(shown[2:])
            )


def moments_of(bank: Bank, values: LayerStatistics) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields for each expert whether its second moment is of inputs or outputs, and that."""
    need = decompose.moment_need(bank.name, bank.shape)
    for value in values[need].value:
        yield need.side, value.double()


def compared(
    weight: torch.Tensor, fisher: torch.Tensor, moment: tuple[str, torch.Tensor], rank: int
) -> tuple[float, ...]:
    """One matrix: its inputs' weights' spread, and what truncations lose, as shares.

    Args:
        weight: ``[out, in]``.
        fisher: Of its inputs ``[in]``.
        moment: Side and matrix.
        rank: Where all are cut.
    """
    weight = weight.double()
    columns = fisher_weights(fisher)
    side, matrix = moment
    parts: dict[str, Any] = {
        "svd": metric_svd(weight),
        "fwsvd": ScaledSVD(weight, columns=columns),
        "svd_llm": metric_svd(weight, **{f"{side}_moment": matrix}),
    }
    products = {}
    for name, part in parts.items():
        left, right = part.factors(rank)
        products[name] = left.double() @ right.double()
    scaled = weight * columns
    own = [
        float((scaled - products[name] * columns).square().sum() / scaled.square().sum())
        for name in ("svd", "fwsvd")
    ]
    outputs = [_lost(weight, products[name], side, matrix) for name in parts]
    return float(columns.max() / columns.median()), *own, *outputs


def _lost(weight: torch.Tensor, product: torch.Tensor, side: str, moment: torch.Tensor) -> float:
    """Which share of a matrix's outputs on its tokens a product of factors loses."""
    if side == "output":  # the inputs are known by what the matrix makes of them: product = Q W
        product = product @ torch.linalg.pinv(weight)
        weight = torch.eye(len(weight), dtype=weight.dtype)
    return loss(weight, product, moment) / loss(weight, torch.zeros_like(weight), moment)


def print_choices(loaded: LoadedComparison, cache: Path | None) -> None:
    """Frequency's choice of experts among all, by NAEE's loss, a line a layer and number."""
    print(
        "\nshare of the energy of the experts' output that is lost; use: the most against the "
        "least used expert; correlation: of use and what the expert alone is missed by"
    )
    print("layer  use  correlation  kept  best   by frequency (place)   mean of all")
    frequencies = live_layers(loaded, "frequency", cache)
    for (values, banks), (used, _) in zip(
        live_layers(loaded, "naee", cache), frequencies, strict=True
    ):
        tokens = used[ExpertFrequency()].tolist()
        experts = list(range(banks["experts.down"].shape.members))
        need = next(need for need in values if isinstance(need, RoutedOutputs))
        missed = SubsetLoss(values[need], experts)
        alone = [missed([e for e in experts if e != gone]) for gone in experts]
        rank = spearmanr(tokens, alone).statistic
        for count in KEPT:
            every = {kept: missed(kept) for kept in itertools.combinations(experts, count)}
            by_use = tuple(sorted(sorted(experts, key=lambda e: (-tokens[e], e))[:count]))
            place = 1 + sum(value < every[by_use] for value in every.values())
            shares = [
                percent(value / missed.energy)
                for value in (min(every.values()), every[by_use], statistics.fmean(every.values()))
            ]
            print(
                f"{values.layer:5}  {max(tokens) / min(tokens):4.1f}  {rank:10.2f}  {count:4}  "
                f"{shares[0]:>6}  {shares[1]:>6} ({place} of {len(every)})   {shares[2]:>6}"
            )


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", nargs="?", type=Path, help="a comparison's directory")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--statistics", action="store_true", help="FWSVD and frequency, as well")
    parser.add_argument("--cache", type=Path, help="the comparison's; by default mctk's own")
    arguments = parser.parse_args()
    loaded = load_comparison([ROOT / "recipes" / "compare_demo.yaml"])
    recipe = loaded.rows[0].recipe
    path, calibration = Path(recipe.model), recipe.calibration
    assert calibration is not None
    windows = calibration_windows(
        load_tokenizer(path), calibration.source, arguments.sequences, calibration.length, 0
    )
    print_original(measure(load_model(path, "cpu", torch.float32, False), windows))
    if arguments.comparison:
        print_rows(arguments.comparison)
    if arguments.statistics:
        print_fisher(loaded, arguments.cache)
        print_choices(loaded, arguments.cache)


if __name__ == "__main__":
    main()
