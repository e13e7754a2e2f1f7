"""What docs/comparison.md says of the causes: figures of the original, and of a comparison's rows.

    python benchmarks/comparison_causes.py                    # the demo model's inputs and outputs
    python benchmarks/comparison_causes.py runs/compare_demo  # and what pruned experts were worth

Of the original: how unequal the energy of the experts' inputs is, and how much of each expert's
output energy is variation about its mean, on the first calibration sequences of the comparison.
Of the rows that remove experts: which share of the calibration's tokens the removed ones had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import torch
from mctk.compare.file import load_comparison
from mctk.data import TokenWindows, calibration_windows
from mctk.evaluate.loading import load_model, load_tokenizer
from mctk.models import find_layers
from mctk.report.tables import fixed, percent
from mctk.runtime import observe
from mctk.runtime.names import IMPLEMENTATION

ROOT = Path(__file__).resolve().parents[1]


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


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", nargs="?", type=Path, help="a comparison's directory")
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    recipe = load_comparison([ROOT / "recipes" / "compare_demo.yaml"]).rows[0].recipe
    path, calibration = Path(recipe.model), recipe.calibration
    assert calibration is not None
    windows = calibration_windows(
        load_tokenizer(path), calibration.source, arguments.sequences, calibration.length, 0
    )
    print_original(measure(load_model(path, "cpu", torch.float32, False), windows))
    if arguments.comparison:
        print_rows(arguments.comparison)


if __name__ == "__main__":
    main()
