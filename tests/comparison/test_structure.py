"""What figures show of the original: CKA, spectra, routing, each against its definition."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from mctk.comparison.similarity import (
    GRID,
    bank_spectra,
    cka_tokens,
    energy_kept,
    evenly,
    linear_cka,
)
from mctk.comparison.structure import structure
from mctk.engine.calibrate import cache_context, calibrate
from mctk.engine.progress import Reporter
from mctk.engine.run import read_calibration
from mctk.planning import make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.statistics import ExpertFrequency, StatisticsCache
from mctk.terms import Bank, BankShape, Dense

from tests.tiny_run import TEXT


def outputs(*values):
    return lambda expert: values[expert]


def test_equal_rotated_and_scaled_outputs_are_alike():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(60, 12, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    cka = linear_cka(outputs(y, 3 * y @ turn + 5, torch.randn(60, 12, generator=generator)), 3)
    assert cka[0, 1] == pytest.approx(1, abs=1e-4)
    assert torch.equal(cka, cka.T) or torch.allclose(cka, cka.T)
    assert torch.allclose(cka.diagonal(), torch.ones(3, dtype=torch.float64))
    assert abs(cka[0, 2]) < 0.2


def test_unrelated_outputs_are_unlike_also_with_few_tokens():
    """The plain estimator would give about 0.9 for 40 tokens of 512 features."""
    generator = torch.Generator().manual_seed(1)
    y = [torch.randn(40, 512, generator=generator) for _ in range(4)]
    cka = linear_cka(outputs(*y), 4)
    off = cka[~torch.eye(4, dtype=torch.bool)]
    assert off.abs().max() < 0.2


def test_an_expert_that_never_varies_is_nan():
    y = torch.randn(30, 8)
    cka = linear_cka(outputs(y, torch.ones(30, 8)), 2)
    assert torch.isnan(cka[0, 1]) and torch.isnan(cka[1, 1]) and cka[0, 0] == pytest.approx(1)
    assert torch.isnan(linear_cka(outputs(y[:3], y[:3]), 2)).all()


def test_gram_matrices_fit_their_memory():
    assert cka_tokens(8) == 1024
    for experts in (1, 64, 256):
        assert experts * cka_tokens(experts) ** 2 * 4 <= 256 << 20


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_kept_energy_is_that_of_the_singular_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    curve = energy_kept(matrix)
    values = torch.linalg.svdvals(matrix.double()).square()
    assert curve[0] == 0 and curve[-1] == pytest.approx(1)
    assert bool((curve.diff() >= -1e-12).all())
    full = min(shape)
    for number in range(0, GRID, 16):  # ranks that the grid hits
        rank = number * full / (GRID - 1)
        if rank == int(rank):
            expected = values[: int(rank)].sum() / values.sum()
            assert curve[number] == pytest.approx(float(expected), abs=1e-9)
    assert torch.equal(energy_kept(torch.zeros(shape)), torch.ones(GRID, dtype=torch.float64))


@pytest.fixture
def make_bank():
    def make(weight):
        members, rows, columns = weight.shape
        shape = BankShape(members, rows, columns)
        term = Dense(shape, tuple(range(members)), weight)
        return Bank("experts.gate", 0, shape, [term])

    return make


def test_equal_experts_leave_no_delta(make_bank):
    one = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(3))
    line = bank_spectra(make_bank(one.expand(4, -1, -1).contiguous()), [1, 2, 3, 4], layers=1)
    assert line["delta_energy"] == pytest.approx(0, abs=1e-10)
    assert line["matrices"] == 4


def test_the_base_is_weighted_by_tokens(make_bank):
    weight = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(4))
    line = bank_spectra(make_bank(weight), [0, 5, 0], layers=1)
    rest = weight - weight[1]
    expected = float(rest.square().sum() / weight.square().sum())
    assert line["delta_energy"] == pytest.approx(expected, rel=1e-5)
    unseen = bank_spectra(make_bank(weight), [0, 0, 0], layers=1)
    rest = weight - weight.mean(0)
    assert unseen["delta_energy"] == pytest.approx(
        float(rest.square().sum() / weight.square().sum()), rel=1e-5
    )


def test_of_large_matrices_some_are_taken(make_bank, monkeypatch):
    monkeypatch.setattr("mctk.comparison.similarity.EXACT", 4)
    weight = torch.randn(6, 12, 8, generator=torch.Generator().manual_seed(5))
    bank = make_bank(weight)
    assert bank_spectra(bank, [1] * 6, layers=32)["matrices"] == 2
    assert bank_spectra(dataclasses.replace(bank, layer=1), [1] * 6, layers=32) is None


def test_even_choice_keeps_both_ends():
    assert list(evenly(3, 8)) == [0, 1, 2]
    assert evenly(32, 8)[0] == 0 and evenly(32, 8)[-1] == 31 and len(set(evenly(32, 8))) == 8


def test_a_model_is_looked_at_once(write_recipe, cache):
    registry = load_plugins()
    texts = [
        {"name": name, "text": str(TEXT / "test" / f"{name}.jsonl"), "length": 64, "windows": 4}
        for name in ("code", "bible")
    ]
    file = write_recipe(evaluate={"perplexity": texts})
    plan = make_plan(load_recipe(file, registry=registry), registry, "cpu")
    windows = read_calibration(plan)
    found = structure(plan, windows, cache, "model", Reporter(quiet=True))
    assert found == json.loads(json.dumps(found))
    assert list(found["routing"]) == ["calibration", "code", "bible"]
    assert found["layers"] == [0, 1, 2] and found["experts"] == [4, 4, 4]
    for one in found["routing"].values():
        for shares in one["shares"]:
            assert sum(shares) == pytest.approx(1)
    cka = torch.tensor(found["similarity"]["cka"])
    assert cka.shape == (3, 4, 4) and torch.allclose(cka.diagonal(dim1=1, dim2=2), torch.ones(3, 4))
    assert found["similarity"]["tokens"] > 500
    assert set(found["spectra"]["banks"]) == {"experts.gate", "experts.up", "experts.down"}
    assert len(found["spectra"]["banks"]["experts.up"]) == 3

    class Idle(Reporter):
        def phase(self, name, total):
            raise AssertionError("it is known")

    assert structure(plan, windows, cache, "model", Idle(quiet=True)) == found


def test_routing_is_what_calibration_counts(write_recipe, cache):
    """The same tokens, counted by the collector of the statistics."""
    registry = load_plugins()
    plan = make_plan(load_recipe(write_recipe(), registry=registry), registry, "cpu")
    windows = read_calibration(plan)
    found = structure(plan, windows, cache, "model", Reporter(quiet=True))
    known = StatisticsCache(cache, cache_context(plan.model, "model", windows.digest, 4))
    needs = {layer: [ExpertFrequency()] for layer in range(3)}
    state = cache / "state"
    state.mkdir(parents=True)
    calibrate(plan.model, windows.ids, 4, needs, plan.sites, known, state, Reporter(quiet=True))
    for layer, shares in enumerate(found["routing"]["calibration"]["shares"]):
        counted = known.get(ExpertFrequency(), layer).double()
        assert torch.allclose(torch.tensor(shares).double(), counted / counted.sum())
