"""Residuals of a Wasserstein barycenter by SVD: each matrix by itself, or an expert's jointly.

    python benchmarks/resmoe_joint.py

For docs/methods/resmoe.md: squared error of a layer's residuals of the demo model, as a share of
their energy, at ranks of each matrix by itself; of the joint form at the same rank, which is what
storing it takes, and at the rank that storing U once would afford.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from mctk import decompose
from mctk.evaluate.loading import load_model
from mctk.linalg import MetricSVD, metric_svd
from mctk.models import find_layers, read_banks
from mctk.report.tables import percent
from mctk_resmoe.barycenter import aligned, barycenter
from mctk_resmoe.residuals import joint

MODEL = Path(__file__).resolve().parents[1] / "recipes" / "demo" / "model"


def main() -> None:
    """Prints a line a rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--ranks", default="16,32,64,96", help="of each matrix, with commas")
    arguments = parser.parse_args()
    with torch.no_grad():
        layer = find_layers(load_model(MODEL, "cpu", torch.float32, False))[1][arguments.layer]
        banks = read_banks(layer, arguments.layer)
        experts = {
            decompose.part_of(name): decompose.own_matrices(bank).weight
            for name, bank in banks.items()
            if name.startswith("experts.")
        }
        residuals = [*left_of(experts)]
    width, inner = experts["down"].shape[1:]
    print("of the parameters   each by itself   joint, same rank   joint, U stored once")
    for rank in map(int, arguments.ranks.split(",")):
        once = rank * 3 * (inner + width) // (inner + 3 * width)
        own = lost([(metric_svd(m), rank) for parts in residuals for m in parts.values()])
        same, more = (lost([(joint(parts), r) for parts in residuals]) for r in (rank, once))
        share = percent(rank * (inner + width) / (inner * width))
        print(f"{share:>17}   {own:.3f} ({rank:3})   {same:16.3f}   {more:.3f} ({once:3})")


def left_of(experts: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields each expert's residual by part."""
    found = barycenter(experts)
    for e in range(len(experts["down"])):
        yield {
            part: aligned(weight, part, found.order, e) - found.support[part]
            for part, weight in experts.items()
        }


def lost(parts: list[tuple[MetricSVD, int]]) -> float:
    """The squared error of truncations, as a share of the energy of all."""
    whole = sum(float(part.spectrum.sum()) for part, _ in parts)
    return sum(float(part.spectrum[rank:].sum()) for part, rank in parts) / whole


if __name__ == "__main__":
    main()
