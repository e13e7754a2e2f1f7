"""SVD-LLM's update: U is the best for its V on the compressed prefix's activations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mctk.decompose import moment_need
from mctk.engine import run
from mctk.errors import RecipeError
from mctk.linalg import metric_svd, update_left
from mctk.planning import make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.statistics import LayerStatistics
from mctk_svdllm.methods import SvdLlm, SvdLlmOptions
from tiny_run import TEXT, cache, mixtral, write_recipe  # noqa: F401

from tests.plugins.test_svdllm import TALL, WIDE, make_bank, make_inputs, measure, output_error

UPDATE = SvdLlmOptions(update=True)


def both(bank, inputs, later):
    """Moments of the original's activations and of the compressed prefix's."""
    need = moment_need(bank.name, bank.shape)
    known = {
        dataclasses.replace(need, of=of): next(iter(measure(bank, x).values()))
        for of, x in (("original", inputs), ("compressed", later))
    }
    return LayerStatistics(2, known, {bank.name})


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("options", [{}, {"balance": True}, {"storage": "pivoted"}])
def test_no_change_where_the_prefix_passes_on_the_same(size, options):
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    plain = SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions(**options))
    new = SvdLlm().decompose(
        bank, both(bank, inputs, inputs), 4, SvdLlmOptions(update=True, **options)
    )
    for member in range(3):
        old, updated = plain[0].materialise(member)[0], new[0].materialise(member)[0]
        assert (updated - old).norm() < 1e-4 * old.norm()


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("balance", [False, True])
def test_the_best_for_its_v_on_the_later_tokens(size, balance):
    """By least squares on the tokens themselves."""
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    later = make_inputs(size, [60, 80, 100], seed=7)
    options = SvdLlmOptions(update=True, balance=balance)
    (new,) = SvdLlm().decompose(bank, both(bank, inputs, later), 4, options)
    (old,) = SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions(balance=balance))
    assert torch.equal(new.V, old.V)
    for member in range(3):
        z = later[member].double() @ new.V[member].double().T
        y = later[member].double() @ bank.materialise(member)[0].double().T
        best = torch.linalg.lstsq(z, y).solution.T
        assert (new.U[member].double() - best).norm() < 1e-3 * best.norm()
    assert output_error(bank, [new], later) < output_error(bank, [old], later)
    assert output_error(bank, [new], inputs) > output_error(bank, [old], inputs)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_directions_that_the_prefix_does_not_show_stay(size):
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    few = [x[:2] for x in make_inputs(size, [60, 80, 100], seed=7)]

    (old,) = SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions())
    keep = SvdLlmOptions(update=True, few_tokens="keep")
    (new,) = SvdLlm().decompose(bank, both(bank, inputs, few), 4, keep)
    moved = torch.linalg.matrix_rank(new.U[0] - old.U[0], rtol=1e-4)
    assert int(moved) == 2
    one = [inputs[0][:0], few[1], few[2]]
    (same,) = SvdLlm().decompose(bank, both(bank, inputs, one), 4, keep)
    assert torch.equal(same.U[0], old.U[0])
    assert not torch.equal(same.U[1], old.U[1])


def test_a_matrix_of_zeros_and_bad_moments():
    weight, moment = torch.randn(6, 8), torch.eye(8)
    left, right = metric_svd(weight).factors(3)
    assert update_left(weight, left, right, input_moment=torch.zeros(8, 8)) is left
    for wrong in ({}, {"input_moment": moment, "output_moment": torch.eye(6)}):
        with pytest.raises(ValueError, match="either"):
            update_left(weight, left, right, **wrong)
    with pytest.raises(ValueError, match="shape"):
        update_left(weight, left, right, output_moment=moment)
    zero = torch.zeros(6, 8)
    left, right = metric_svd(zero).factors(3)
    assert update_left(zero, left, right, input_moment=moment).isfinite().all()


def test_full_rank_stays_the_identity():
    for size in (WIDE, TALL):
        bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
        later = make_inputs(size, [60, 80, 100], seed=7)
        (term,) = SvdLlm().decompose(bank, both(bank, inputs, later), 8, UPDATE)
        error = term.materialise(1)[0] - bank.materialise(1)[0]
        assert error.norm() < 1e-4 * bank.materialise(1)[0].norm()


def test_a_run(write_recipe, cache, tmp_path):  # noqa: F811
    """The first layer's prefix is the original: the update begins to count in the second."""
    registry = load_plugins()
    found = {}
    for update in (False, True):
        path = write_recipe(
            str(update),
            output=str(tmp_path / str(update)),
            dtype="float32",
            storage_dtype="float32",
            steps=[{"decompose": "svd_llm", "options": {"rank_multiple": 1, "update": update}}],
        )
        recipe = load_recipe(path, registry=registry)
        plan = make_plan(recipe, registry)
        assert bool(plan.recollected) == update
        if update:  # what the original gives is still wanted
            assert [need for need in plan.needs[0] if getattr(need, "bank", "") == "experts.down"]
        [found[update]] = run([recipe], registry, cache=cache)
    errors = {
        update: [layer["trace"][-1]["layer_error"] for layer in metrics["layers"]]
        for update, metrics in found.items()
    }
    assert errors[True][0] == pytest.approx(errors[False][0], rel=1e-3)
    assert errors[True][1] != pytest.approx(errors[False][1], rel=1e-3)
    path = write_recipe(
        steps=[{"decompose": "svd_llm", "options": {"update": True}}],
        calibration={
            "text": str(TEXT / "calibration" / "*.jsonl"),
            "sequences": 4,
            "length": 64,
            "propagate": "compressed",
        },
    )
    with pytest.raises(RecipeError, match=r"svd_llm \(steps.0\) compares .* propagate: original"):
        make_plan(load_recipe(path, registry=registry), registry)
