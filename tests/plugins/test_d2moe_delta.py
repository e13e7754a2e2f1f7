"""Properties of the delta decomposition: the least error that its shared factors allow."""

from __future__ import annotations

import pytest
import torch
from d2moe_layer import Tokens, after, asked_for, make_layer, measure, on_meta
from mctk.errors import UserError
from mctk.statistics import LayerStatistics, Moment, SecondMoment
from mctk.terms import DENSE, Bank, BankShape, Dense, LowRank
from mctk_d2moe.delta import DeltaSvd
from mctk_d2moe.merges import FisherMerge

METHOD = DeltaSvd()
# Gate and up [8, 6], down [6, 8]; then narrow experts, whose V can have more rows than a U has.
SIZES = {"wide": {"hidden": 6, "neurons": 8}, "narrow": {"hidden": 9, "neurons": 4}}


def prepared(size="wide", merged=True, bases=1, **kwargs):
    """A layer after a merge, and the statistics of what that left."""
    layer = make_layer(**SIZES[size], **kwargs)
    tokens = Tokens(hidden=SIZES[size]["hidden"], count=200)
    present = layer
    if merged:
        options = FisherMerge.Options(bases=bases, align=True)
        present = after(layer, FisherMerge().merge(layer, measure(layer, tokens), None, options))
    return present, measure(layer, tokens, present), tokens


def decomposed(layer, statistics, name, rank, **options):
    options = METHOD.Options(rank_multiple=1, **options)
    bank = layer[name]
    asked = asked_for(METHOD, {name: bank}, statistics, options)
    terms = METHOD.decompose(bank, asked, rank, options)
    curve = METHOD.curve({name: bank}, asked, options)
    settings, costs = METHOD.sizes({name: bank}, options)
    planned = METHOD.layout(on_meta({name: bank}), rank, options)[name]
    return (
        terms,
        dict(zip(settings, curve, strict=True)),
        dict(zip(settings, costs, strict=True)),
        planned,
    )


def lost(layer, statistics, name, terms, share):
    """The squared output error of a bank, on each expert's tokens or on all in all experts."""
    of = "current"
    total = 0.0
    for e in range(layer[name].shape.members):
        if share == "none":
            moment = statistics[SecondMoment(name, "input", of=of)].value[e]
        else:
            pooled = statistics[SecondMoment(name, "input", of=of, pooled=True)]
            moment = pooled.value[0] / layer[name].shape.members
        new = Bank(name, 3, layer[name].shape, terms).materialise(e)[0]
        error = (layer[name].materialise(e)[0] - new).double()
        total += float((error @ moment.double() * error).sum())
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["experts.gate", "experts.up", "experts.down"])
@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("share", ["none", "v", "both"])
def test_loss_is_the_sum_of_dropped_squares_and_plans_are_exact(size, name, storage, share):
    layer, statistics, _ = prepared(size)
    options = {"share": share, "storage": storage}
    _, curve, costs, _ = decomposed(layer, statistics, name, 1, **options)
    errors = list(curve.values())
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0
    start = next(iter(errors))
    for rank, error in curve.items():
        terms, _, _, planned = decomposed(layer, statistics, name, rank, **options)
        found = lost(layer, statistics, name, terms, share)
        assert found == pytest.approx(error, rel=1e-3, abs=1e-5 * start)
        assert [t.spec() for t in planned] == [t.spec() for t in terms]
        assert terms[1].parameters() == costs[rank]
        assert terms[0] is layer[name].terms[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["experts.gate", "experts.down"])
def test_shared_v_is_the_optimum_of_the_stack(size, name):
    layer, statistics, _ = prepared(size)
    moment = statistics[SecondMoment(name, "input", of="current", pooled=True)].value[0].double()
    stack = layer[name].terms[1].weight.flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(moment / 4)
    sigma = torch.linalg.svdvals(stack @ (vectors * values.clamp(min=0).sqrt()))
    for rank in (1, 2, 4):
        terms, curve, _, _ = decomposed(layer, statistics, name, rank, share="v")
        assert curve[rank] == pytest.approx(float(sigma[rank:].square().sum()), rel=1e-5)
        factors = terms[1]
        assert (factors.stored_u, factors.stored_v) == (4, 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("storage", ["plain", "pivoted"])
@pytest.mark.parametrize("share", ["none", "v"])
@pytest.mark.parametrize("merged", [True, False])
def test_full_rank_is_the_identity(size, storage, share, merged):
    layer, statistics, _ = prepared(size, merged)
    for name, bank in layer.items():
        rank = bank.shape.in_features if share == "v" else min(*bank.terms[0].weight.shape[1:])
        terms, _, _, _ = decomposed(layer, statistics, name, rank, share=share, storage=storage)
        for e in range(4):
            own = bank.materialise(e)[0]
            new = Bank(name, 3, bank.shape, terms).materialise(e)[0]
            assert (new - own).norm() < 2e-4 * own.norm()


def test_a_shared_v_can_have_more_rows_than_each_u_and_pays_once():
    layer, _, _ = prepared("narrow")
    options = METHOD.Options(share="v", rank_multiple=1)
    settings, costs = METHOD.sizes({"experts.up": layer["experts.up"]}, options)
    assert settings == [1, 2, 3, 4, 5, 6, 7, 8, 9, DENSE]
    assert costs == [r * (4 * 4 + 9) for r in range(1, 10)] + [4 * 4 * 9]
    options = METHOD.Options(share="v", rank_multiple=1, storage="pivoted")
    settings, costs = METHOD.sizes({"experts.up": layer["experts.up"]}, options)
    assert costs == [r * (4 * 4 + 9) - r * r for r in range(1, 10)] + [4 * 4 * 9]


def test_share_both_gives_every_expert_the_same_mean_factor():
    layer, statistics, _ = prepared()
    terms, _, _, _ = decomposed(layer, statistics, "experts.up", 3, share="both")
    apart, _, _, _ = decomposed(layer, statistics, "experts.up", 3, share="v")
    assert terms[1].U.shape[0] == terms[1].V.shape[0] == 1
    assert torch.allclose(terms[1].U[0], apart[1].U.mean(0), atol=1e-5)
    assert torch.equal(terms[1].V, apart[1].V)


def test_members_without_a_matrix_stay_without():
    shape = BankShape(3, 5, 4)
    weight = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    bank = Bank("experts.up", 3, shape, [Dense(shape, [1, None, 0], weight)])
    need = SecondMoment("experts.up", "input", pooled=True)
    statistics = LayerStatistics(3, {need: Moment(torch.eye(4)[None], torch.tensor([9]))}, {})
    (term,) = METHOD.decompose(bank, statistics, 4, METHOD.Options(share="v"))
    assert isinstance(term, LowRank)
    assert (term.u_slots, term.v_slots) == ((1, None, 0), (0, None, 0))
    assert torch.allclose(term.materialise(2)[0], weight[0], atol=1e-5)


def test_needs_follow_what_the_steps_before_change():
    tall, wide = BankShape(8, 16, 12), BankShape(8, 12, 40)
    own, shared = METHOD.Options(), METHOD.Options(share="v")
    assert METHOD.needs(tall, "experts.up", own) == [SecondMoment("experts.up", "input")]
    assert METHOD.needs(wide, "experts.up", own) == [
        SecondMoment("experts.up", "output", of="current")
    ]
    down = SecondMoment("experts.down", "input", of="current", pooled=True)
    assert METHOD.needs(wide, "experts.down", shared) == [down]
    up = SecondMoment("experts.up", "input", pooled=True)
    assert METHOD.needs(tall, "experts.up", shared) == [up]


def test_every_option_changes_something():
    layer, statistics, _ = prepared(experts=4)

    def product(name="experts.up", **options):
        terms, _, _, _ = decomposed(layer, statistics, name, 3, **options)
        return terms[1].materialise(0)[0], terms[1]

    plain, _ = product()
    for share in ("v", "both"):
        assert not torch.allclose(plain, product(share=share)[0], atol=1e-3)
    assert not torch.allclose(plain, product(min_tokens=10**4)[0], atol=1e-3)
    less, _ = product(min_tokens=10**4, few_tokens="keep")
    assert torch.allclose(plain, less, atol=1e-4)
    for share in ("none", "v"):
        same, balanced = product(share=share, balance=True)
        expected, other = product(share=share)
        assert torch.allclose(same, expected, atol=1e-4)
        assert not torch.allclose(balanced.V, other.V, atol=1e-2)
        pivoted = product(share=share, storage="pivoted")
        assert torch.allclose(pivoted[0], expected, atol=1e-3)
        assert pivoted[1].parameters() < other.parameters()
    bank = {"experts.up": layer["experts.up"]}
    coarse, _ = METHOD.sizes(bank, METHOD.Options(share="v", rank_multiple=3))
    assert coarse == [3, 6, DENSE]


def test_mistakes_are_named():
    layer, statistics, _ = prepared()
    bank = layer["experts.up"]
    for share, full in (("v", 6), ("both", 6), ("none", 6)):
        options = METHOD.Options(share=share)
        for rank in (0, full + 1, None):
            with pytest.raises(UserError, match=f"up of layer 3: rank {rank} is not .* and {full}"):
                METHOD.decompose(bank, statistics, rank, options)
        assert METHOD.decompose(bank, statistics, DENSE, options) == bank.terms
    need = SecondMoment("experts.up", "input", pooled=True)
    for value, count, message in (
        (torch.zeros(1, 6, 6), 0, "no calibration token reached it"),
        (torch.full((1, 6, 6), torch.nan), 3, "layer 3: input moment contains NaN"),
    ):
        moment = Moment(value, torch.tensor([count]))
        with pytest.raises(UserError, match=message):
            METHOD.curve(
                {"experts.up": bank},
                LayerStatistics(3, {need: moment}, {"experts.up"}),
                METHOD.Options(share="v"),
            )
