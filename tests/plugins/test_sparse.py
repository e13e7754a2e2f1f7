"""Entries and channels: masks, sizes, statistics, and what is stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.statistics import ChannelEnergy
from mctk.terms import DENSE, Bank, BankShape, Bias, Dense, LowRank, Sparse
from mctk_sparse.channels import ChannelOptions, Channels
from mctk_sparse.entries import EntryOptions, Magnitude, MagnitudeOptions, Wanda, slot_energy
from mctk_sparse.masks import dropped, keep, sizes
from pydantic import ValidationError
from tiny_run import cache, mixtral, write_recipe  # noqa: F401

SHAPE = BankShape(3, 6, 16)


def noise(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make_bank(name="experts.gate", shape=SHAPE, slots=(0, 1, 2), seed=0):
    weight = noise(len({s for s in slots if s is not None}), shape.out_features,
                   shape.in_features, seed=seed)  # fmt: skip
    return Bank(
        name,
        2,
        shape,
        [Dense(shape, slots, weight), Bias(shape, [0] * 3, noise(1, shape.out_features))],
    )


def on_meta(banks):
    return {
        name: Bank(name, 2, bank.shape, [term.to(device="meta") for term in bank.terms])
        for name, bank in banks.items()
    }


def energies(bank, values):
    return {ChannelEnergy(bank): values}


def layer(intermediate=12, hidden=5, seed=0):
    wide, down = BankShape(3, intermediate, hidden), BankShape(3, hidden, intermediate)
    return {
        "experts.gate": make_bank("experts.gate", wide, seed=seed),
        "experts.up": make_bank("experts.up", wide, seed=seed + 1),
        "experts.down": make_bank("experts.down", down, seed=seed + 2),
    }


def channel_energy(values):
    return {ChannelEnergy("experts.down", of="current"): values}


# Masks.


def test_rows_keep_their_best():
    scores = noise(5, 12).abs()
    mask = keep(scores, 4, None, by_row=True)
    assert mask.sum(1).tolist() == [4] * 5
    for row, kept in zip(scores, mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_a_matrix_keeps_its_best():
    scores = noise(5, 12).abs()
    mask = keep(scores, 4, None, by_row=False)
    assert int(mask.sum()) == 20 and scores[mask].min() >= scores[~mask].max()
    assert mask.sum(1).tolist() != [4] * 5


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
def test_patterns_keep_the_best_of_neighbours(n, m):
    scores = noise(3, 16).abs()
    mask = keep(scores, 16 // m * n, (n, m), by_row=True)
    for i, start in itertools.product(range(3), range(0, 16, m)):
        own, kept = scores[i, start : start + m], mask[i, start : start + m]
        assert int(kept.sum()) == n and own[kept].min() >= own[~kept].max()


def test_equal_scores_keep_the_first():
    assert keep(torch.ones(2, 6), 2, None, True).nonzero()[:, 1].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_curves_are_what_masks_drop(pattern, by_row):
    scores = noise(5, 16).abs()
    settings = sizes(16, pattern)
    for count, lost in zip(settings, dropped(scores, settings, pattern, by_row), strict=True):
        gone = ~keep(scores, count, pattern, by_row)
        assert lost == pytest.approx(float(scores[gone].double().square().sum()))


def test_sizes_are_at_most_256():
    assert sizes(16, None) == list(range(1, 16))
    assert len(sizes(14336, None)) <= 256 and max(sizes(14336, None)) < 14336
    assert sizes(16, (4, 8)) == [8]


# Magnitude and Wanda.


@pytest.mark.parametrize("storage", ["bitmap", "positions"])
def test_what_stays_is_exact_and_counted(storage):
    bank = make_bank()
    banks = {bank.name: bank}
    options = MagnitudeOptions(storage=storage)
    counts, costs = Magnitude().sizes(banks, options)
    assert counts == [*range(1, 16), DENSE] and costs[-1] == 3 * 6 * 16
    for count, cost in zip(counts[:-1], costs, strict=False):
        sparse, bias = Magnitude().prune(banks, None, count, options)[bank.name]
        assert isinstance(sparse, Sparse) and isinstance(bias, Bias)
        assert sparse.parameters() == cost == 3 * 6 * count
        planned = Magnitude().layout(on_meta(banks), count, options)[bank.name][0]
        assert planned.spec() == sparse.spec() and planned.device.type == "meta"
        for member in range(3):
            weight, exact = sparse.materialise(member)[0], bank.terms[0].weight[member]
            kept = weight != 0
            assert torch.equal(weight[kept], exact[kept])
            assert exact[kept].abs().min() >= exact[~kept].abs().max()
    assert Magnitude().prune(banks, None, DENSE, options)[bank.name] == bank.terms


def test_wanda_scores_entries_by_their_inputs():
    bank = make_bank()
    energy = noise(3, 16, seed=4).square()
    statistics = energies(bank.name, energy)
    [sparse, _] = Wanda().prune({bank.name: bank}, statistics, 6, EntryOptions())[bank.name]
    for member in range(3):
        score = bank.terms[0].weight[member].abs() * energy[member].sqrt()
        assert torch.equal(sparse.materialise(member)[0] != 0, keep(score, 6, None, True))
    # Inputs of equal energy: magnitude within the row.
    same = Wanda().prune({bank.name: bank}, energies(bank.name, torch.full((3, 16), 7.0)), 6,
                         EntryOptions())[bank.name][0]  # fmt: skip
    plain = Magnitude().prune({bank.name: bank}, None, 6, MagnitudeOptions(within="row"))
    assert torch.equal(same.materialise(1)[0], plain[bank.name][0].materialise(1)[0])
    # More tokens of the same kind change nothing.
    more = Wanda().prune({bank.name: bank}, energies(bank.name, 9 * energy), 6, EntryOptions())
    assert torch.equal(more[bank.name][0].materialise(2)[0], sparse.materialise(2)[0])


def test_wanda_is_the_best_mask_for_uncorrelated_inputs():
    """Of all masks of a row: the least squared output error where inputs do not correlate."""
    shape = BankShape(1, 1, 6)
    weight, energy = noise(1, 1, 6), noise(1, 6, seed=3).square()
    bank = Bank("mlp.up", 0, shape, [Dense(shape, [0], weight)])
    [sparse] = Wanda().prune({"mlp.up": bank}, energies("mlp.up", energy), 2, EntryOptions())[
        "mlp.up"
    ]
    error = float(((sparse.materialise(0)[0] - weight[0]).square() @ energy[0]).sum())
    others = [
        float((weight[0, 0].square() * energy[0])[[j for j in range(6) if j not in kept]].sum())
        for kept in itertools.combinations(range(6), 2)
    ]
    assert error == pytest.approx(min(others))
    curve = Wanda().curve({"mlp.up": bank}, energies("mlp.up", energy), EntryOptions())
    assert curve[1] == pytest.approx(error) and curve[-1] == 0.0
    assert curve == sorted(curve, reverse=True)


def test_experts_without_tokens_take_the_layers_inputs():
    bank = make_bank()
    energy = noise(3, 16, seed=5).square()
    energy[1] = 0
    found = slot_energy(bank, bank.terms[0], energy)
    assert torch.equal(found[0], energy[0]) and torch.equal(found[1], energy.sum(0))
    with pytest.raises(UserError, match=r"experts\.gate of layer 2: no calibration token"):
        slot_energy(bank, bank.terms[0], torch.zeros(3, 16))


def test_merged_members_add_their_inputs():
    bank = make_bank(slots=(0, 0, 1))
    energy = noise(3, 16, seed=5).square()
    found = slot_energy(bank, bank.terms[0], energy)
    assert torch.equal(found, torch.stack([energy[0] + energy[1], energy[2]]))


def test_residuals_are_pruned_and_bases_stay():
    base = Dense(SHAPE, [0, 0, 0], noise(1, 6, 16, seed=9))
    own = Dense(SHAPE, [0, 1, 2], noise(3, 6, 16))
    bank = Bank("experts.gate", 2, SHAPE, [base, own])
    found = Magnitude().prune({bank.name: bank}, None, 4, MagnitudeOptions())[bank.name]
    assert found[0] is base and isinstance(found[1], Sparse)


def test_blocks_of_rows_and_columns_stay_blocks():
    rows, cols = torch.tensor([[5, 1], [0, 2], [3, 4]]), torch.arange(8)
    own = Dense(SHAPE, [0, 1, 2], noise(3, 2, 8), rows=rows, cols=cols)
    bank = Bank("experts.gate", 2, SHAPE, [own])
    energy = torch.ones(3, 16)
    energy[:, :8] = noise(3, 8, seed=5).square()
    [found] = Wanda().prune({bank.name: bank}, energies(bank.name, energy), 3, EntryOptions())[
        bank.name
    ]
    assert found.parameters() == 3 * 2 * 3
    score = own.weight[1].abs() * energy[1, :8].sqrt()
    expected = torch.zeros(6, 16)
    expected[rows[1], :8] = own.weight[1] * keep(score, 3, None, True)
    assert torch.equal(found.materialise(1)[0], expected)


def test_what_cannot_be_pruned_is_refused():
    bank = make_bank()
    low = LowRank(SHAPE, [0, 1, 2], [0, 1, 2], U=noise(3, 6, 2), V=noise(3, 2, 16))
    with pytest.raises(UserError, match=r"holds no full matrices to prune \(lowrank\)"):
        Magnitude().sizes({"x": Bank("x", 0, SHAPE, [low])}, MagnitudeOptions())
    odd = BankShape(3, 6, 10)
    with pytest.raises(UserError, match="rows of 10 do not divide into groups of 4"):
        Wanda().sizes({"x": make_bank("x", odd)}, EntryOptions(pattern="2:4"))
    for size in (None, 0, 17):
        with pytest.raises(UserError, match=f"cannot keep {size} of 16"):
            Magnitude().layout({bank.name: bank}, size, MagnitudeOptions())
    with pytest.raises(UserError, match="pattern 2:4 keeps 8 of 16 entries of a row, not 5"):
        Magnitude().layout({bank.name: bank}, 5, MagnitudeOptions(pattern="2:4"))
    with pytest.raises(ValidationError, match="within has no effect"):
        EntryOptions(pattern="2:4", within="row")


# Channels.


def hidden(banks, member, x):
    gate, up = (banks[f"experts.{part}"].apply(x, member) for part in ("gate", "up"))
    return torch.nn.functional.silu(gate) * up


def output(banks, member, x):
    return banks["experts.down"].apply(hidden(banks, member, x), member)


def pruned(banks, statistics, size, **options):
    found = Channels().prune(banks, statistics, size, ChannelOptions(**options))
    return {name: Bank(name, 2, banks[name].shape, terms) for name, terms in found.items()}


def measured(banks, x):
    return channel_energy(torch.stack([hidden(banks, e, x).square().sum(0) for e in range(3)]))


def test_sliced_experts_are_masked_experts():
    banks, x = layer(), noise(20, 5, seed=8)
    statistics = measured(banks, x)
    now = pruned(banks, statistics, 7)
    assert {n: b.terms[0].weight.shape for n, b in now.items()} == {
        "experts.gate": (3, 7, 5), "experts.up": (3, 7, 5), "experts.down": (3, 5, 7),
    }  # fmt: skip
    for member in range(3):
        kept = now["experts.down"].terms[0].cols[member].long()
        assert torch.equal(kept, kept.sort().values)
        for part in ("gate", "up"):
            assert torch.equal(now[f"experts.{part}"].terms[0].rows[member].long(), kept)
        h = hidden(banks, member, x)
        masked = torch.zeros_like(h)
        masked[:, kept] = h[:, kept]
        expected = banks["experts.down"].apply(masked, member)
        torch.testing.assert_close(output(now, member, x), expected, atol=1e-5, rtol=1e-5)


def test_a_channels_score_is_what_it_alone_adds():
    banks, x = layer(), noise(20, 5, seed=8)
    statistics = measured(banks, x)
    curve = Channels().curve(banks, statistics, ChannelOptions(channel_multiple=1))
    counts = Channels().sizes(banks, ChannelOptions(channel_multiple=1))[0]
    eleven = curve[counts.index(11)]
    now = pruned(banks, statistics, 11, channel_multiple=1)
    lost = sum(float((output(now, e, x) - output(banks, e, x)).square().sum()) for e in range(3))
    assert eleven == pytest.approx(lost, rel=1e-4)
    assert curve == sorted(curve, reverse=True) and curve[-1] == 0.0


def test_sizes_and_layout_are_what_is_stored():
    banks = layer()
    statistics = channel_energy(noise(3, 12, seed=3).square())
    options = ChannelOptions(channel_multiple=4)
    counts, costs = Channels().sizes(banks, options)
    assert counts == [4, 8, DENSE] and costs == [3 * 3 * 5 * n for n in (4, 8, 12)]
    for count, cost in zip(counts, costs, strict=True):
        found = Channels().prune(banks, statistics, count, options)
        planned = Channels().layout(on_meta(banks), count, options)
        stored = 0
        for name, terms in found.items():
            assert [t.spec() for t in planned[name]] == [t.spec() for t in terms]
            stored += terms[0].parameters()
        assert stored == cost
    assert all(found[name] == banks[name].terms for name in banks)


def test_order_of_channels_and_experts_does_not_matter():
    banks = layer()
    energy = noise(3, 12, seed=3).square()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = {}
    for name, bank in banks.items():
        weight = bank.terms[0].weight
        weight = weight[:, :, order] if name.endswith("down") else weight[:, order]
        moved[name] = Bank(name, 2, bank.shape, [Dense(bank.shape, [0, 1, 2], weight)])
    before = pruned(banks, channel_energy(energy), 5)["experts.down"].terms[0].cols
    after = pruned(moved, channel_energy(energy[:, order]), 5)["experts.down"].terms[0].cols
    for member in range(3):
        assert set(order[after[member].long()].tolist()) == set(before[member].tolist())


def test_magnitude_needs_no_data_and_no_scale():
    banks = layer()
    options = ChannelOptions(score="magnitude")
    shape = banks["experts.down"].shape
    assert Channels().needs(shape, "experts.down", options) == []
    assert Channels().needs(shape, "experts.down", ChannelOptions()) == [
        ChannelEnergy("experts.down", of="current")
    ]
    first = pruned(banks, None, 5, score="magnitude")["experts.down"].terms[0].cols
    # up ten times larger and down ten times smaller in one channel is the same expert.
    banks["experts.up"].terms[0].weight[:, 3] *= 10
    banks["experts.down"].terms[0].weight[:, :, 3] /= 10
    assert torch.equal(
        pruned(banks, None, 5, score="magnitude")["experts.down"].terms[0].cols, first
    )


def test_experts_without_tokens_go_by_magnitude():
    banks = layer()
    energy = noise(3, 12, seed=3).square()
    energy[2] = 0
    found = pruned(banks, channel_energy(energy), 5)["experts.down"].terms[0].cols
    plain = pruned(banks, None, 5, score="magnitude")["experts.down"].terms[0].cols
    assert torch.equal(found[2], plain[2]) and not torch.equal(found[0], plain[0])


def test_channels_of_what_is_no_full_matrix_are_refused():
    banks = layer()
    shape = banks["experts.up"].shape
    banks["experts.up"].terms[0] = LowRank(
        shape, [0, 1, 2], [0, 1, 2], U=noise(3, 12, 2), V=noise(3, 2, 5)
    )
    with pytest.raises(UserError, match=r"experts\.up of layer 2 holds lowrank"):
        Channels().sizes(banks, ChannelOptions())
    with pytest.raises(UserError, match="has lost channels before"):
        Channels().sizes(pruned(layer(), channel_energy(torch.ones(3, 12)), 5), ChannelOptions())
    with pytest.raises(UserError, match="an expert of 12 channels cannot keep 13"):
        Channels().layout(layer(), 13, ChannelOptions())


# Through recipes.

ORIGINAL = {"sequences": 12, "length": 64, "batch": 4, "propagate": "original"}


@pytest.mark.parametrize(
    "step, later",
    [
        ({"prune": "wanda"}, [{"quantize": "rtn"}]),
        ({"prune": "wanda", "options": {"pattern": "2:4"}}, []),
        ({"prune": "magnitude"}, []),
        ({"prune": "channels"}, [{"quantize": "rtn", "options": {"bits": 3}}]),
    ],
    ids=["wanda then rtn", "wanda 2:4", "magnitude", "channels then rtn"],
)
def test_half_of_the_experts_goes(write_recipe, cache, step, later):  # noqa: F811
    text = load_recipe(write_recipe()).calibration.text
    path = write_recipe(
        steps=[step, *later],
        budget={"remove": 0.5, "of": "experts"},
        calibration={"text": text, **ORIGINAL},
        gate=bool(later),
    )
    [metrics] = run([load_recipe(path)], load_plugins(), cache=cache)
    found = metrics["sizes"]
    assert found["planned"] == found["attained"]
    assert found["attained"]["expert_parameters"] * 2 == found["original"]["expert_parameters"]
    if later:
        assert metrics["gate"]["fresh_process_equal"]


def test_wanda_on_attention_in_bytes(write_recipe, cache):  # noqa: F811
    text = load_recipe(write_recipe()).calibration.text
    path = write_recipe(
        steps=[{"prune": "wanda", "targets": "attention.*"}],
        budget={"remove": 0.3, "of": "targets", "unit": "bytes"},
        calibration={"text": text, **ORIGINAL},
    )
    [metrics] = run([load_recipe(path)], load_plugins(), cache=cache)
    found = metrics["sizes"]
    assert found["planned"] == found["attained"]
    removed = found["original"]["bytes"] - found["attained"]["bytes"]
    attention = 3 * (2 * 48 * 48 + 2 * 24 * 48) * 2
    assert 0.3 * attention <= removed < 0.34 * attention
