"""What the dense section of docs/comparison.md says of the causes: how unequal inputs are.

    python benchmarks/dense_causes.py recipes/compare_smollm2.yaml

For each kind of linear layer of a dense model, over its layers: the energy of the strongest input
channel over that of the median one, and how many directions hold 90 % of the inputs' energy. Where
both are even, a plain SVD of the weights is as good as one in the metric of the activations.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from mctk.comparison.file import load_comparison
from mctk.data import calibration_windows
from mctk.evaluate.loading import load_model, load_tokenizer
from mctk.models import bank_sites, find_layers
from mctk.registry import load_plugins


def moments(model: torch.nn.Module, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """Σ x xᵀ [in, in] of what enters linear layers, by layer and bank; k and v see what q sees."""
    found: dict[tuple[int, str], torch.Tensor] = {}
    for number, layer in enumerate(find_layers(model)[1]):
        for name, site in bank_sites(layer).items():

            def add(module, inputs, key=(number, name)) -> None:
                x = inputs[0].detach().flatten(0, -2).float()
                found[key] = found.get(key, 0) + x.T @ x

            if name not in ("attention.k", "attention.v", "mlp.up"):  # inputs of q and gate
                layer.get_submodule(site.module).register_forward_pre_hook(add)
    with torch.no_grad():
        for batch in ids.split(4):
            model(batch, use_cache=False)
    return found


def main() -> None:
    """Runs the first calibration sequences and prints a line a bank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("comparison", type=Path, help="a comparison's file")
    parser.add_argument("--sequences", type=int, default=16, help="how many are run")
    given = parser.parse_args()
    loaded = load_comparison([given.comparison], registry=load_plugins())
    recipe = loaded.rows[0].recipe
    path = Path(recipe.model)
    drawn = recipe.calibration
    windows = calibration_windows(
        load_tokenizer(path), drawn.source, drawn.sequences, drawn.length, recipe.seed
    )
    model = load_model(path, "cpu", torch.float32, False)
    sums = moments(model, windows.ids[: given.sequences])
    print(f"{path}: {min(given.sequences, len(windows.ids)) * drawn.length} tokens")
    print("inputs of    strongest/median channel       directions for 90 %   of")
    for name in dict.fromkeys(bank for _, bank in sums):
        ratios, directions = [], []
        mine = [moment for (_, bank), moment in sums.items() if bank == name]
        for moment in mine:
            energy = moment.diagonal()
            ratios.append(float(energy.max() / energy.median()))
            values = torch.linalg.eigvalsh(moment.double()).flip(0)
            shares = values.cumsum(0) / values.sum()
            directions.append(int((shares < 0.9).sum()) + 1)
        print(
            f"{name:12} {min(ratios):8.1f} .. {statistics.median(ratios):8.1f} .. "
            f"{max(ratios):9.1f}   {min(directions):3} .. {statistics.median(directions):5.0f} .. "
            f"{max(directions):4}   {len(mine[0])}"
        )


if __name__ == "__main__":
    main()
