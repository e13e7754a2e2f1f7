"""Several bases: clusters, the order of neurons, and how many bases a layer gets."""

from __future__ import annotations

import pytest
import torch
from d2moe_layer import (
    NAMES,
    Tokens,
    after,
    asked_for,
    base_of,
    make_layer,
    measure,
    on_meta,
    output,
    run,
    with_weights,
)
from mctk.errors import UserError
from mctk.linalg import reorder
from mctk.statistics import ExpertFrequency, Fisher, LayerStatistics, SecondMoment
from mctk.terms import Bank, BankShape, Bias
from mctk_d2moe import auto, clusters
from mctk_d2moe.merges import Mean

SHARES = (0.1, 0.2, 0.3, 0.4)


# Clusters.


def planted(seed=0, spread=0.1, experts=8, kinds=4):
    """Experts that come in kinds: expert e is of kind e % kinds."""
    generator = torch.Generator().manual_seed(seed)
    layer = make_layer(experts=experts, seed=seed)

    def change(name, weight):
        kind = torch.randn(kinds, *weight.shape[1:], generator=generator)
        return kind[[e % kinds for e in range(experts)]] + spread * weight

    return with_weights(layer, change)


@pytest.mark.parametrize("similarity", ["weight", "output"])
def test_clusters_find_planted_kinds(similarity):
    layer, tokens = planted(), Tokens(experts=8)
    terms = run("mean", layer, measure(layer, tokens), bases=4, similarity=similarity)
    for bank in NAMES:
        assert terms[bank][0].slots == (0, 1, 2, 3, 0, 1, 2, 3)


def test_similarity_by_output_looks_at_the_inputs_that_there_are():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, 6, generator=generator)
    weight[2, :, :3], weight[3, :, :3] = weight[0, :, :3], weight[1, :, :3]
    weight[1, :, 3:], weight[3, :, 3:] = weight[0, :, 3:], weight[2, :, 3:]
    weight[:, :, 3:] *= 3  # by weight 0 belongs to 1, by what enters to 2
    seen = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert clusters.clusters(clusters.differences(weight), 2) == [[0, 1], [2, 3]]
    assert clusters.clusters(clusters.differences(weight, seen), 2) == [[0, 2], [1, 3]]


def test_differences_are_squared_relative_distances():
    weight, x = torch.randn(3, 4, 5), torch.randn(7, 5)
    got = clusters.differences(weight, x.T @ x)
    outputs = torch.stack([x @ w.T for w in weight]).double()
    energy = outputs.square().sum((1, 2)).mean()
    expected = (outputs[:, None] - outputs[None]).square().sum((2, 3)) / energy
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(clusters.differences(torch.zeros(3, 2, 2)), torch.zeros(3, 3).double())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_clusters_are_as_many_as_asked_for_even_of_equals(count):
    groups = clusters.clusters(torch.zeros(5, 5, dtype=torch.double), count)
    assert len(groups) == count and sorted(e for g in groups for e in g) == list(range(5))


# Alignment.


def shuffled(layer, seed=3):
    """Every expert's neurons in another order: the same functions."""
    generator = torch.Generator().manual_seed(seed)
    up = layer["experts.up"].shape
    order = torch.stack(
        [torch.randperm(up.out_features, generator=generator) for _ in range(up.members)]
    )
    return with_weights(layer, lambda name, w: reorder(w, name.split(".")[1], order)), order


def test_alignment_recovers_a_planted_order():
    layer, tokens = make_layer(spread=0.05), Tokens(shares=SHARES)
    mixed, order = shuffled(layer)
    statistics = measure(mixed, tokens)
    assert torch.allclose(output(mixed, tokens), output(layer, tokens), atol=1e-4)
    terms = run("mean", mixed, statistics, align=True)
    straight = run("mean", layer, statistics)
    anchor = int(statistics[ExpertFrequency()].argmax())
    expected = straight["experts.up"][0].weight[0][order[anchor]]
    assert torch.allclose(base_of(terms, 0), expected, atol=1e-6)
    loose = run("mean", mixed, statistics)
    assert terms["experts.up"][1].weight.norm() < 0.2 * loose["experts.up"][1].weight.norm()


def test_alignment_with_clusters_finds_kinds_whatever_the_order():
    layer, tokens = planted(spread=0.05), Tokens(experts=8)
    mixed, _ = shuffled(layer)
    terms = run("fisher", mixed, measure(mixed, tokens), bases=4, align=True)
    assert terms["experts.down"][0].slots == (0, 1, 2, 3, 0, 1, 2, 3)
    assert torch.allclose(output(after(mixed, terms), tokens), output(layer, tokens), atol=1e-3)


def test_alignment_moves_fisher_and_moments_along():
    layer, tokens = make_layer(spread=0.05), Tokens(shares=SHARES)
    mixed, order = shuffled(layer)
    one, other = measure(layer, tokens), measure(mixed, tokens)
    values = dict(other.items())
    for need in one:
        if isinstance(need, Fisher):
            values[need] = reorder(one[need], need.bank.split(".")[1], order)
    other = LayerStatistics(3, values, set(layer))
    anchor = int(one[ExpertFrequency()].argmax())
    for name in ("fisher", "regmean"):
        straight = run(name, layer, one)
        terms = run(name, mixed, other, align=True)
        expected = straight["experts.down"][0].weight[0][:, order[anchor]]
        assert torch.allclose(base_of(terms, 0, "experts.down"), expected, atol=1e-3)


def test_alignment_moves_shared_biases_as_well():
    layer, tokens = make_layer(bias=True), Tokens(shares=SHARES)
    bank = layer["experts.up"]
    shared = Bias(bank.shape, [0, 0, None, 0], torch.randn(1, 8))
    layer["experts.up"] = Bank(bank.name, 3, bank.shape, [bank.terms[0], shared])
    terms = run("mean", layer, measure(layer, tokens), align=True)
    assert torch.allclose(output(after(layer, terms), tokens), output(layer, tokens), atol=1e-3)
    assert terms["experts.up"][2].slots == (0, 1, None, 2)


# bases: auto.


def test_auto_finds_the_planted_number_of_bases():
    layer, tokens = planted(spread=0.1, experts=8), Tokens(experts=8, count=200)
    statistics = measure(layer, tokens)
    whole = sum(bank.shape.parameters for bank in layer.values())
    terms = run("mean", layer, statistics, int(0.8 * whole), bases="auto", min_rank=1)
    assert terms["experts.up"][0].weight.shape[0] == 4
    # What four would leave is rank 1; one leaves 2.
    terms = run("mean", layer, statistics, int(0.8 * whole), bases="auto", min_rank=2)
    assert terms["experts.up"][0].weight.shape[0] == 1
    # One kind whose experts differ in one direction: one base and rank 1 are all that it takes.
    same = with_weights(layer, lambda name, w: w[:1] + w[:, :, :1] @ torch.ones(1, w.shape[2]))
    terms = run("mean", same, measure(same, tokens), 3 * (48 + 8 * 14), bases="auto", min_rank=1)
    assert terms["experts.up"][0].weight.shape[0] == 1


def test_auto_takes_the_least_expected_error_and_asks_only_for_what_it_needs():
    layer, tokens = planted(spread=0.7), Tokens(experts=8, count=200)
    statistics = measure(layer, tokens)
    for align_ in (False, True):
        for storage in ("plain", "pivoted"):
            options = Mean().Options(bases="auto", storage=storage, align=align_, min_rank=1)
            needed = asked_for(Mean(), layer, statistics, options)
            size = 500
            terms = Mean().merge(layer, needed, size, options)
            chosen = terms["experts.up"][0].weight.shape[0]
            errors = {}
            for count in auto.candidates(8):
                parts = run("mean", layer, statistics, bases=count, align=align_)
                rank = auto.rank_within(8, 8, 6, size // 3 - count * 48, storage)
                if rank < 1:
                    continue
                present = after(layer, parts)
                total = 0.0
                moments = measure(layer, tokens, present)
                for bank in NAMES:
                    moment = moments[SecondMoment(bank, "input", of="current")].value
                    for e in range(8):
                        left = parts[bank][1].weight[e].double()
                        values, vectors = torch.linalg.eigh(moment[e].double())
                        root = vectors * values.clamp(min=0).sqrt()
                        total += float(torch.linalg.svdvals(left @ root)[rank:].square().sum())
                errors[count] = total
            assert chosen == min(errors, key=errors.get)


def test_auto_without_a_budget_or_plan():
    layer, tokens = planted(), Tokens(experts=8)
    with pytest.raises(UserError, match=r"bases: auto in layer 3 .* budget"):
        run("mean", layer, measure(layer, tokens), bases="auto")
    options = Mean().Options(bases="auto")
    with pytest.raises(UserError, match="budget"):
        Mean().layout(on_meta(layer), None, options)
    assert Mean().layout(on_meta(layer), 10_000, options) is None
    wide = BankShape(8, 4, 16)
    assert Mean().needs(wide, "experts.down", options) == []
    assert Mean().needs(wide, "experts.up", options) == [SecondMoment("experts.up", "input")]


def test_rank_within_is_the_largest_that_fits():
    for storage in ("plain", "pivoted"):
        for parameters in (0, 13, 14, 100, 1000, 10**6):
            rank = auto.rank_within(3, 8, 6, parameters, storage)
            cost = [3 * (r * 14 - (r * r if storage == "pivoted" else 0)) for r in range(7)]
            assert rank == max(r for r in range(7) if cost[r] <= parameters)
    assert [auto.candidates(e) for e in (2, 3, 8, 60)] == [[1], [1], [1, 2, 4], [1, 2, 4, 8, 16]]
