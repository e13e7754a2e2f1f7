"""Properties of FWSVD and ASVD: the best of their rank in a weighted norm."""

from __future__ import annotations

import shutil

import families
import pytest
import torch
from mctk.decompose import LowRankOptions
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.statistics import ChannelFisher, ChannelMagnitude, LayerStatistics, Magnitude
from mctk.terms import DENSE, Bank, BankShape, Dense
from mctk_svd.methods import Asvd, AsvdOptions, Fwsvd, FwsvdOptions, Svd
from tiny_run import DEMO, cache, mixtral, write_recipe  # noqa: F401

SIZES = [(12, 20), (20, 12)]


def make_bank(size, members=3, slots=None, name="experts.gate"):
    generator = torch.Generator().manual_seed(0)
    shape = BankShape(members, *size)
    slots = list(range(members)) if slots is None else slots
    stored = len({slot for slot in slots if slot is not None})
    weight = torch.randn(stored, *size, generator=generator)
    return Bank(name, 3, shape, [Dense(shape, slots, weight)])


def entries(bank):
    """Squared gradients of all weights, [members, out, in]; their sums are far from even."""
    generator = torch.Generator().manual_seed(1)
    shape = bank.shape.members, bank.shape.out_features, bank.shape.in_features
    of = [torch.rand(shape[0], n, generator=generator) ** 4 for n in shape[1:]]
    return of[0][:, :, None] * of[1][:, None] * torch.rand(shape, generator=generator)


def fisher(bank, value=None):
    sums = {"input": entries(bank).sum(1), "output": entries(bank).sum(2)}
    known = {
        ChannelFisher(bank.name, side): of if value is None else value for side, of in sums.items()
    }
    return LayerStatistics(3, known, {bank.name})


def magnitude(bank, counts=(100, 200, 300), value=None):
    generator = torch.Generator().manual_seed(2)
    mean = torch.rand(bank.shape.members, bank.shape.in_features, generator=generator) ** 3
    mean = mean if value is None else value
    count = torch.tensor(counts)
    known = {ChannelMagnitude(bank.name): Magnitude(mean * count[:, None], count)}
    return LayerStatistics(3, known, {bank.name})


def best(weight, rank, rows=None, columns=None):
    """The optimum of the weighted norm, by a full SVD."""
    rows = torch.ones(weight.shape[0]) if rows is None else rows
    columns = torch.ones(weight.shape[1]) if columns is None else columns
    rows, columns = rows.double(), columns.double()
    scaled = rows[:, None] * weight.double() * columns
    u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    return (u[:, :rank] * s[:rank] @ v[:rank]) / rows[:, None] / columns


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_the_best_of_its_rank_in_the_weighted_norm(size, storage):
    bank = make_bank(size)
    for side, weighed in (("input", "columns"), ("output", "rows")):
        options = FwsvdOptions(storage=storage, side=side)
        (term,) = Fwsvd().decompose(bank, fisher(bank), 5, options)
        for member in range(3):
            weights = fisher(bank)[ChannelFisher(bank.name, side)][member].sqrt()
            expected = best(bank.terms[0].weight[member], 5, **{weighed: weights})
            assert distance(term.materialise(member)[0], expected) < 1e-4
    (term,) = Asvd().decompose(bank, magnitude(bank), 5, AsvdOptions(storage=storage))
    for member in range(3):
        mean = magnitude(bank)[ChannelMagnitude(bank.name)].mean()[member]
        expected = best(bank.terms[0].weight[member], 5, columns=mean**0.5 + 1e-6)
        assert distance(term.materialise(member)[0], expected) < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_fwsvd_solves_the_papers_problem(size):
    """In its own notation: ``y = x W`` with W [in, out], and the rows of W weighed."""
    bank = make_bank(size)
    (term,) = Fwsvd().decompose(bank, fisher(bank), 5, FwsvdOptions())
    others = [
        Svd().decompose(bank, None, 5, LowRankOptions())[0],
        Fwsvd().decompose(bank, fisher(bank), 5, FwsvdOptions(side="output"))[0],
    ]
    for member in range(3):
        w = bank.terms[0].weight[member].T.double()
        importance = entries(bank)[member].T.double().sum(1).sqrt().diag()
        u, s, v = torch.linalg.svd(importance @ w, full_matrices=False)
        product = importance.inverse() @ (u[:, :5] * s[:5]) @ v[:5]
        assert distance(term.materialise(member)[0].T, product) < 1e-4
        lost, *more = (
            float((importance @ (w - other.materialise(member)[0].T)).norm())
            for other in (term, *others)
        )
        assert all(lost < 0.9 * other for other in more)


@pytest.mark.parametrize("size", SIZES)
def test_full_rank_is_the_identity(size):
    bank = make_bank(size)
    zero = fisher(bank)[ChannelFisher(bank.name, "input")].clone()
    zero[:, 0] = 0
    for found in (
        Fwsvd().decompose(bank, fisher(bank, value=zero), 12, FwsvdOptions()),
        Asvd().decompose(bank, magnitude(bank), 12, AsvdOptions()),
    ):
        for member in range(3):
            assert distance(found[0].materialise(member)[0], bank.materialise(member)[0]) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_even_weights_are_plain_svd(size):
    bank = make_bank(size)
    (plain,) = Svd().decompose(bank, None, 4, LowRankOptions())
    even = 7.0 * torch.ones(3, size[1])
    cases = [
        Fwsvd().decompose(bank, fisher(bank, value=even), 4, FwsvdOptions()),
        Fwsvd().decompose(bank, fisher(bank, value=0 * even), 4, FwsvdOptions()),
        Asvd().decompose(bank, magnitude(bank), 4, AsvdOptions(alpha=0.0)),
        Asvd().decompose(bank, magnitude(bank, value=torch.ones(3, size[1])), 4, AsvdOptions()),
    ]
    for (term,) in cases:
        assert distance(term.materialise(0)[0], plain.materialise(0)[0]) < 1e-5


def test_the_curve_is_what_is_dropped_of_the_weighted_matrix():
    bank = make_bank((12, 20))
    options = AsvdOptions(rank_multiple=2)
    settings, _ = Asvd().sizes({bank.name: bank}, options)
    curve = Asvd().curve({bank.name: bank}, magnitude(bank), options)
    assert settings[-1] == DENSE and curve[-1] == 0.0
    assert curve == sorted(curve, reverse=True)
    (term,) = Asvd().decompose(bank, magnitude(bank), settings[1], options)
    mean = magnitude(bank)[ChannelMagnitude(bank.name)].mean()
    lost = bank.terms[0].weight - torch.stack([term.materialise(e)[0] for e in range(3)])
    measured = (lost * (mean.sqrt() + 1e-6)[:, None]).square().sum()
    assert float(measured) == pytest.approx(curve[1], rel=1e-3)


def test_every_option_changes_something():
    bank = make_bank((12, 20))
    few = magnitude(bank, counts=(10, 200, 300))

    def first(**options):
        return Asvd().decompose(bank, few, 4, AsvdOptions(**options))[0].materialise(0)[0]

    assert distance(first(), first(alpha=1.0)) > 1e-3
    assert distance(first(), first(few_tokens="keep")) > 1e-3
    assert distance(first(), first(min_tokens=1000)) > 1e-3
    assert distance(first(min_tokens=10), first(few_tokens="keep")) == 0
    generator = torch.Generator().manual_seed(5)
    every = {
        ChannelFisher(bank.name, side, labels): torch.rand(3, n, generator=generator)
        for side, n in (("input", 20), ("output", 12))
        for labels in ("data", "model")
    }
    statistics = LayerStatistics(3, every, {bank.name})
    data, model, output = (
        Fwsvd().decompose(bank, statistics, 4, FwsvdOptions(**options))[0].materialise(0)[0]
        for options in ({}, {"labels": "model"}, {"side": "output"})
    )
    assert distance(data, model) > 1e-3 and distance(data, output) > 1e-3


def test_few_tokens():
    bank = make_bank((12, 20))
    (plain,) = Svd().decompose(bank, None, 4, LowRankOptions())
    unseen = magnitude(bank, counts=(0, 200, 300))
    (kept,) = Asvd().decompose(bank, unseen, 4, AsvdOptions(few_tokens="keep"))
    assert distance(kept.materialise(0)[0], plain.materialise(0)[0]) < 1e-5
    (pooled,) = Asvd().decompose(bank, unseen, 4, AsvdOptions())
    known = unseen[ChannelMagnitude(bank.name)]
    mean = known.value.sum(0) / known.count.sum()
    expected = best(bank.terms[0].weight[0], 4, columns=mean**0.5 + 1e-6)
    assert distance(pooled.materialise(0)[0], expected) < 1e-4
    with pytest.raises(UserError, match=r"fewer than 64 tokens: 0 \(0\)"):
        Asvd().decompose(bank, unseen, 4, AsvdOptions(few_tokens="error"))
    with pytest.raises(UserError, match="no calibration token reached it"):
        Asvd().decompose(bank, magnitude(bank, counts=(0, 0, 0)), 4, AsvdOptions())


def test_merged_members_share_their_statistics_where_their_channels_are_in_place():
    output = FwsvdOptions(side="output")
    down = make_bank((12, 20), slots=[0, 1, 0], name="experts.down")
    (term,) = Fwsvd().decompose(down, fisher(down), 4, output)
    rows = fisher(down)[ChannelFisher(down.name, "output")][[0, 2]].sum(0).sqrt()
    assert distance(term.materialise(0)[0], best(down.terms[0].weight[0], 4, rows=rows)) < 1e-4
    with pytest.raises(UserError, match="merged before, and its neurons may have changed places"):
        Asvd().decompose(down, magnitude(down), 4, AsvdOptions())
    with pytest.raises(UserError, match=r"decompose/fwsvd: experts.down of layer 3 was merged"):
        Fwsvd().decompose(down, fisher(down), 4, FwsvdOptions())
    gate = make_bank((12, 20), slots=[0, 1, 0])
    with pytest.raises(UserError, match=r"decompose/fwsvd: .* of layer 3 was merged"):
        Fwsvd().layout({gate.name: gate}, 4, output)
    Asvd().decompose(gate, magnitude(gate), 4, AsvdOptions())
    Fwsvd().layout({gate.name: gate}, 4, FwsvdOptions())
    dropped = make_bank((12, 20), slots=[0, None, 1])
    (term,) = Fwsvd().decompose(dropped, fisher(dropped), 4, output)
    rows = fisher(dropped)[ChannelFisher(dropped.name, "output")][2].sqrt()
    assert distance(term.materialise(2)[0], best(dropped.terms[0].weight[1], 4, rows=rows)) < 1e-4


def test_on_experts_attention_and_shared_mlps(write_recipe, cache, tmp_path):  # noqa: F811
    """Both in one recipe; their statistics are found again by a second run."""
    steps = [
        {"decompose": "fwsvd", "options": {"rank_multiple": 1}},
        {"decompose": "asvd", "targets": "attention.*", "options": {"rank_multiple": 1}},
    ]
    registry = load_plugins()
    path = write_recipe(steps=steps, budget={"remove": 0.3, "of": "model"})
    [first] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert first["statistics"]["backward_sweeps"] == 1
    path = write_recipe(
        "again", steps=steps, budget={"remove": 0.2, "of": "model"}, output=str(tmp_path / "b")
    )
    [second] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert second["statistics"]["backward_sweeps"] == second["statistics"]["sweeps"] == 0
    assert {bank for layer in second["layers"] for bank in layer["banks"]} >= {
        "experts.down",
        "attention.q",
    }


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_on_dense_and_shared_mlps(family, write_recipe, cache, tmp_path):  # noqa: F811
    model = tmp_path / "model"
    families.tiny(family, vocab_size=4096).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    banks = ["mlp.*"] if family == "llama" else ["shared_expert.*"]
    options = {"rank_multiple": 1}
    path = write_recipe(
        model=str(model),
        steps=[
            {"decompose": "asvd", "targets": banks, "options": options},
            {"decompose": "fwsvd", "targets": "attention.*", "options": options},
        ],
        budget={"remove": 0.3, "of": "targets"},
    )
    registry = load_plugins()
    [metrics] = run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    rows = [row for layer in metrics["layers"] for row in layer["trace"]]
    assert all(0 < row["bank_error"] < 1 for row in rows)
