"""Runs of one set that cut the same matrices at several sizes find their directions once."""

from __future__ import annotations

import pytest
import torch
from mctk.engine import compress, run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

# Residuals and moments are made or read anew for each run: what is equal is found by its content.
STEPS = [{"merge": "mean"}, {"decompose": "delta_svd", "options": {"rank_multiple": 1}}]


@pytest.fixture
def solved(monkeypatch):
    """The eigenproblems that are solved while layers are in memory."""
    found = []
    eigh = torch.linalg.eigh

    def counting(*arguments, **settings):
        found.append(arguments[0].shape)
        return eigh(*arguments, **settings)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    return found


def test_two_sizes_cost_the_decompositions_of_one(
    write_recipe, tmp_path, cache, solved, monkeypatch
):
    registry = load_plugins()

    def made(place, budgets):
        recipes = [
            load_recipe(
                write_recipe(
                    output=str(tmp_path / place / f"{remove:g}"),
                    budget={"remove": remove, "of": "experts"},
                    allocate={"method": "by_loss"},
                    steps=STEPS,
                ),
                registry=registry,
            )
            for remove in budgets
        ]
        solved.clear()
        run(recipes, registry, cache=cache)
        return len(solved), [
            {path.name: path.read_bytes() for path in recipe.output.glob("*.safetensors")}
            for recipe in recipes
        ]

    single, [first] = made("alone", [0.6])
    _, [second] = made("alone", [0.7])
    both, together = made("set", [0.6, 0.7])
    matrices = 3 * 3 * 4  # layers, banks, experts: none stays dense at these sizes
    assert single == both == 2 * matrices  # once for the curves of all, once for their factors
    assert together == [first, second]
    monkeypatch.setattr(compress, "DIRECTIONS_SHARE", 0.0)
    without, again = made("no room", [0.6, 0.7])
    # Each run by itself, and of each bank its curve, the size that is tried, and its factors.
    assert without == 2 * 3 * matrices and again == together
