"""Semi-dynamic pruning: the right channels go, from every base at once, and plans say how many."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from d2moe_layer import (
    NAMES,
    Tokens,
    activations,
    after,
    asked_for,
    make_layer,
    measure,
    on_meta,
    output,
)
from mctk.errors import UserError
from mctk.statistics import ChannelEnergy, ExpertFrequency, RouterWeight
from mctk.terms import DENSE, BankShape, Bias, Dense, DynamicDense
from mctk_d2moe import channels
from mctk_d2moe.delta import DeltaSvd
from mctk_d2moe.merges import FisherMerge
from mctk_d2moe.prune import SemiDynamic
from pydantic import ValidationError

METHOD = SemiDynamic()
SHARES = (0.1, 0.2, 0.3, 0.4)


def merged(bases=1, align=False, bias=False, rank=None):
    """A merged layer, decomposed too if there is a rank, and statistics of its present state."""
    layer, tokens = make_layer(bias=bias, spread=0.7), Tokens(shares=SHARES)
    options = FisherMerge.Options(bases=bases, align=align)
    present = after(layer, FisherMerge().merge(layer, measure(layer, tokens), None, options))
    statistics = measure(layer, tokens, present, channels=True)
    if rank is not None:
        step = DeltaSvd()
        parts = {n: step.decompose(b, statistics, rank, step.Options()) for n, b in present.items()}
        present = after(present, parts)
    return present, statistics, tokens


def prune(layer, statistics, size=None, **options):
    options = METHOD.Options(**{"channel_multiple": 1, **options})
    return METHOD.prune(layer, asked_for(METHOD, layer, statistics, options), size, options)


def bases_of(terms):
    return [terms[name][0] for name in NAMES]


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [None, 1, 5, DENSE])
@pytest.mark.parametrize("dynamic", [0.0, 0.25])
def test_layout_and_sizes_are_what_comes_out(bases, rank, bias, size, dynamic):
    layer, statistics, _ = merged(bases, bias=bias, rank=rank)
    options = METHOD.Options(static=0.3, dynamic=dynamic, channel_multiple=1)
    terms = prune(layer, statistics, size, static=0.3, dynamic=dynamic)
    planned = METHOD.layout(on_meta(layer), size, options)
    for name in NAMES:
        found = terms[name]
        assert [t.spec() for t in planned[name]] == [t.spec() for t in found]
        assert found[1:] == layer[name].terms[1:]
        assert any(isinstance(t, Bias) for t in found) == bias
    settings, costs = METHOD.sizes(on_meta(layer), options)
    assert settings == [*range(1, 8), DENSE] and costs == sorted(costs)
    if size is not None:
        stored = sum(base.parameters() for base in bases_of(terms))
        assert stored == costs[settings.index(size)]
    kept = {None: 6, 1: 1, 5: 5, DENSE: 8}[size]
    gate, up, down = bases_of(terms)
    assert gate.weight.shape == up.weight.shape == (bases, kept, 6)
    assert down.weight.shape == (bases, 6, kept)
    for base in (gate, up, down):
        assert isinstance(base, DynamicDense) == (dynamic > 0 and kept > 1)
        if isinstance(base, DynamicDense):
            assert base.drop == 2


def test_without_anything_to_do_nothing_changes():
    layer, statistics, _ = merged()
    with pytest.raises(ValidationError, match="nothing would be pruned"):
        METHOD.Options(static=0.0)
    with pytest.raises(UserError, match="rounds to none in multiples of 8"):
        METHOD.layout(on_meta(layer), None, METHOD.Options(static=0.05))
    terms = prune(layer, statistics, DENSE)
    assert all(terms[name] == layer[name].terms for name in NAMES)


@pytest.mark.parametrize("align", [False, True])
def test_channels_that_stay_have_the_highest_scores(align):
    layer, statistics, tokens = merged(align=align)
    mixed = sum(
        tokens.routing[:, e : e + 1] * activations(layer, tokens.x, e) for e in range(4)
    ).double()
    down = layer["experts.down"].terms[0].weight[0].double()
    expected = torch.stack([(mixed[:, j : j + 1] * down[:, j]).square().sum() for j in range(8)])
    best = expected.topk(5).indices.sort().values
    terms = prune(layer, statistics, 5)
    gate, up, pruned = bases_of(terms)
    for index in (gate.rows, up.rows, pruned.cols):
        assert index.dtype == torch.int32 and torch.equal(index.long(), best)
    for name, base in zip(NAMES, bases_of(terms), strict=True):
        whole = layer[name].terms[0].weight[0]
        part = base.materialise(0)[0]
        gone = torch.ones(8, dtype=torch.bool).scatter(0, best, False)
        if name == "experts.down":
            part, whole = part.T, whole.T
        assert torch.equal(part[best], whole[best]) and not part[gone].any()
    curve = METHOD.curve(layer, statistics, METHOD.Options(channel_multiple=1))
    ordered = expected.sort().values
    for kept, error in zip([*range(1, 8), 8], curve, strict=True):
        assert error == pytest.approx(float(ordered[: 8 - kept].sum()), rel=1e-4, abs=1e-12)


def test_a_dropped_channel_costs_its_score_in_the_layers_output():
    """Down's base alone loses it; what gate and up change besides is not in the score."""
    layer, statistics, tokens = merged()
    terms = prune(layer, statistics, 7)
    only_down = {**layer, "experts.down": after(layer, terms)["experts.down"]}
    error = (output(only_down, tokens) - output(layer, tokens)).double().square().sum()
    curve = METHOD.curve(layer, statistics, METHOD.Options(channel_multiple=1))
    assert float(error) == pytest.approx(curve[6], rel=1e-3)


def test_several_bases_choose_by_their_own_experts():
    layer, statistics, tokens = merged(bases=2)
    down = layer["experts.down"].terms[0]
    terms = prune(layer, statistics, 3)
    _, up, pruned = bases_of(terms)
    assert pruned.cols.shape == up.rows.shape == (2, 3)
    counts, routing = statistics[ExpertFrequency()], statistics[RouterWeight()]
    for slot in range(2):
        energy = torch.zeros(8, dtype=torch.double)
        for e in (e for e in range(4) if down.slots[e] == slot):
            mean = float(routing[e]) / int(counts[e])
            energy += mean**2 * activations(layer, tokens.of(e), e).double().square().sum(0)
        expected = energy * down.weight[slot].double().square().sum(0)
        assert set(pruned.cols[slot].tolist()) == set(expected.topk(3).indices.tolist())
    curve = METHOD.curve(layer, statistics, METHOD.Options(channel_multiple=1))
    assert curve == sorted(curve, reverse=True) and curve[-1] == 0.0


def test_group_energy_of_one_expert_a_token_is_exact():
    """With one expert for each token and a constant weight nothing is left out."""
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    frequency, routing = torch.tensor([2, 4, 0]), torch.tensor([1.0, 1.0, 0.0])
    got = channels.group_energy(own, frequency, routing, [[0, 2], [1]])
    assert torch.equal(got, torch.tensor([[0.25, 0.5], [0.1875, 0.25]]).double())


def test_dynamic_half_carries_energies_and_counts_as_stored():
    layer, statistics, _ = merged(bases=2)
    plain = prune(layer, statistics, 6)
    dynamic = prune(layer, statistics, 6, dynamic=0.25)
    for one, two in zip(bases_of(plain), bases_of(dynamic), strict=True):
        assert torch.equal(one.weight, two.weight)
        assert two.axis == ("rows" if two.energy is None else "cols")
        assert two.macs(0) < one.macs(0)
        assert two.parameters() == one.parameters() + (0 if two.energy is None else 2 * 6)
    energy = bases_of(dynamic)[2].energy
    assert energy.shape == (2, 6) and energy.dtype == torch.float32
    assert torch.equal(energy.amax(1), torch.ones(2))
    down = layer["experts.down"].terms[0]
    scores = channels.scores(
        down.weight,
        channels.group_energy(
            statistics[ChannelEnergy("experts.down", of="current")],
            statistics[ExpertFrequency()],
            statistics[RouterWeight()],
            [[e for e in range(4) if down.slots[e] == slot] for slot in range(2)],
        ),
    )
    kept = scores.gather(1, bases_of(dynamic)[2].cols.long())
    assert torch.allclose(energy.double(), kept / kept.amax(1, keepdim=True), atol=1e-6)


def test_a_base_without_tokens_is_judged_by_its_columns():
    down = torch.tensor([[[1.0, 3.0, 2.0]]])
    scores = channels.scores(down, torch.zeros(1, 3))
    assert torch.equal(channels.keep(scores, 2), torch.tensor([[1, 2]]))


def test_of_equal_channels_the_first_stay():
    assert torch.equal(channels.keep(torch.ones(2, 5), 3), torch.tensor([[0, 1, 2]] * 2))


@pytest.mark.parametrize(
    ("count", "share", "multiple", "left"),
    [
        (14336, 0.05, 8, 13616),
        (14336, 0.0, 8, 14336),
        (100, 0.0, 8, 100),
        (100, 0.01, 8, 100),
        (100, 0.1, 8, 88),
        (64, 0.05, 8, 64),
        (64, 0.0625, 8, 64),
        (64, 0.1, 8, 56),
        (64, 0.99, 8, 8),
        (5, 0.9, 8, 5),
        (8, 1.0, 1, 1),
    ],
)
def test_counts_are_rounded_to_the_nearest_multiple(count, share, multiple, left):
    assert channels.remaining(count, share, multiple) == left


def test_needs():
    shape = BankShape(4, 6, 8)
    options = METHOD.Options()
    assert METHOD.needs(shape, "experts.up", options) == []
    assert set(METHOD.needs(shape, "experts.down", options)) == {
        ChannelEnergy("experts.down", weighted=True, of="current"),
        ChannelEnergy("experts.down", of="current"),
        ExpertFrequency(),
        RouterWeight(),
    }


def test_every_option_changes_something():
    layer, statistics, _ = merged()
    counts = {
        prune(layer, statistics, **options)["experts.up"][0].weight.shape[1]
        for options in ({"static": 0.2}, {"static": 0.4}, {"static": 0.2, "channel_multiple": 4})
    }
    assert counts == {6, 5, 8}
    assert isinstance(prune(layer, statistics, dynamic=0.2)["experts.up"][0], DynamicDense)
    assert METHOD.sizes(layer, METHOD.Options(channel_multiple=3))[0] == [3, 6, DENSE]


def test_mistakes_are_named():
    layer, statistics, _ = merged()
    two = {name: layer[name] for name in NAMES[:2]}
    with pytest.raises(UserError, match=r"layer 3 cuts gate, up and down .* not experts.gate, exp"):
        METHOD.layout(on_meta(two), None, METHOD.Options())
    for banks in (make_layer(), after(layer, {"experts.up": layer["experts.up"].terms[1:]})):
        with pytest.raises(UserError, match=r"of layer 3 has no base that experts share: .* merge"):
            METHOD.sizes(on_meta(banks), METHOD.Options())
    again = after(layer, prune(layer, statistics, 5))
    with pytest.raises(UserError, match=r"base of experts.gate in layer 3 was pruned before"):
        prune(again, statistics, 4)
    again = after(layer, prune(layer, statistics, DENSE, dynamic=0.3))
    with pytest.raises(UserError, match="pruned before"):
        prune(again, statistics, 4)
    for size in (0, 9):
        with pytest.raises(UserError, match=f"8 channels cannot keep {size}"):
            prune(layer, statistics, size)
    up = layer["experts.up"]
    other = Dense(up.shape, [0, 0, 0, 1], torch.ones(2, 8, 6))
    mixed = {**layer, "experts.up": dataclasses.replace(up, terms=[other, *up.terms[1:]])}
    with pytest.raises(UserError, match=r"up and experts.down of layer 3 share bases differently"):
        prune(mixed, statistics, 4)
    with pytest.raises(ValidationError, match="together must be below 1"):
        METHOD.Options(static=0.5, dynamic=0.5)
