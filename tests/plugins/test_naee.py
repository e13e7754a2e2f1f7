"""NAEE: the loss of a subset of experts, the searches, and what they make of a layer."""

from __future__ import annotations

import itertools

import pytest
import torch
from d2moe_layer import after, make_layer, on_meta
from mctk.errors import UserError
from mctk.notes import collect
from mctk.statistics import LayerStatistics, RoutedOutputs
from mctk.terms import DENSE, drop_members, removed_members
from mctk_naee import methods
from mctk_naee.loss import SubsetLoss
from mctk_naee.search import beam, count_subsets, exact
from pydantic import ValidationError
from routed_layer import RoutedLayer, hand_made

from tests.families import FAMILIES

NAEE, _ = methods()


def tokens(experts=6, count=50, hidden=5, seed=0, top=2):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, experts, generator=generator)
    return logits, torch.randn(count, experts, hidden, generator=generator)


def statistics_of(sample, tokens=16384):
    return LayerStatistics(3, {RoutedOutputs(tokens): sample}, {"experts.down"})


def by_brute_force(logits, outputs, kept, top=2):
    """‖Z − Z'‖² with the other experts' logits at −∞, every output summed anew, in float64."""
    sums = []
    for members in (range(logits.shape[1]), kept):
        masked = torch.full(logits.shape, float("-inf"), dtype=torch.float64)
        masked[:, list(members)] = logits[:, list(members)].double()
        weights = masked.softmax(1)
        best = weights.topk(top, dim=1)
        share = torch.zeros_like(weights).scatter(1, best.indices, best.values)
        share = share / share.sum(1, keepdim=True)
        sums.append((share[:, :, None] * outputs.double()).sum(1))
    return float((sums[0] - sums[1]).square().sum())


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_loss_of_a_subset_is_that_of_the_sums(top):
    logits, outputs = tokens(top=top)
    loss = SubsetLoss(hand_made(logits, outputs, top), range(6))
    assert loss.whole <= 1e-6 * loss.energy and loss.top == top
    for size in (3, 5):
        for kept in itertools.combinations(range(6), size):
            expected = by_brute_force(logits, outputs, kept, top)
            assert loss(kept) == pytest.approx(expected, rel=1e-4, abs=1e-6 * loss.energy)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "olmoe"])
def test_the_loss_is_that_of_the_layer_with_the_experts_gone(family):
    routed = RoutedLayer(family)
    bank = routed.experts["experts.down"]
    experts = bank.shape.members
    exact_output = routed.run()
    loss = SubsetLoss(routed.sample, range(experts))
    assert loss.whole <= 1e-5 * loss.energy
    width = experts // bank.groups
    for left_out in itertools.islice(itertools.product(range(width), repeat=bank.groups), 9):
        gone = {number * width + e for number, e in enumerate(left_out)}
        kept = tuple(e for e in range(experts) if e not in gone)
        terms = {name: drop_members(bank, gone) for name, bank in routed.experts.items()}
        expected = float((routed.run_with(terms) - exact_output).double().square().sum())
        assert loss(kept) == pytest.approx(expected, rel=1e-3, abs=1e-5 * loss.energy)


def test_another_target_is_missed_even_with_all_experts():
    """A progressive run: what the layer should give is not what it gives now."""
    logits, outputs = tokens()
    sample = hand_made(logits, outputs)
    shifted = torch.randn(
        outputs.shape[0], outputs.shape[2], generator=torch.Generator().manual_seed(9)
    )
    index, weights = sample.route(range(6))
    z = (outputs.gather(1, index[:, :, None].expand(-1, -1, 5)) * weights[:, :, None]).sum(1)
    target = z + shifted
    sample = type(sample)(
        sample.inputs,
        sample.gram,
        (outputs @ target[:, :, None])[:, :, 0],
        target.square().sum(1),
        sample.route,
    )
    loss = SubsetLoss(sample, range(6))
    assert loss.whole == pytest.approx(float(shifted.square().sum()), rel=1e-4)
    index, weights = sample.route((0, 2, 3, 5))
    ours = (outputs.gather(1, index[:, :, None].expand(-1, -1, 5)) * weights[:, :, None]).sum(1)
    assert loss((0, 2, 3, 5)) == pytest.approx(float((ours - target).square().sum()), rel=1e-4)


def test_an_expert_that_is_never_chosen_goes_at_no_loss():
    logits, outputs = tokens()
    logits[:, 3] = -30.0
    loss = SubsetLoss(hand_made(logits, outputs), range(6))
    assert loss((0, 1, 2, 4, 5)) == pytest.approx(loss.whole, abs=1e-6 * loss.energy)
    for search in (exact, beam):
        assert search(loss, [list(range(6))], 5).kept == (0, 1, 2, 4, 5)


@pytest.mark.parametrize("seed", range(3))
def test_exact_is_the_minimum_and_the_others_are_near_it(seed):
    logits, outputs = tokens(seed=seed)
    loss = SubsetLoss(hand_made(logits, outputs), range(6))
    groups = [list(range(6))]
    for size in (2, 3, 4, 5):
        every = {
            s: by_brute_force(logits, outputs, s) for s in itertools.combinations(range(6), size)
        }
        best = exact(loss, groups, size)
        assert every[best.kept] == pytest.approx(min(every.values()), rel=1e-4)
        assert best.tried == len(every) == count_subsets(groups, size)
        greedy, wide = beam(loss, groups, size), beam(loss, groups, size, width=1000)
        assert best.loss <= wide.loss <= greedy.loss
        assert wide.loss == best.loss
    assert beam(loss, groups, 5).kept == exact(loss, groups, 5).kept
    assert beam(loss, groups, 6).kept == tuple(range(6))


def test_ties_keep_the_first_experts():
    for search in (exact, beam):
        assert search(lambda kept: 1.0, [list(range(5))], 3).kept == (0, 1, 2)
        assert search(lambda kept: 1.0, [[0, 1, 2], [3, 4, 5]], 4).kept == (0, 1, 3, 4)


def test_groups_lose_equally_many():
    generator = torch.Generator().manual_seed(1)
    worth = torch.rand(12, generator=generator).tolist()
    pairs = torch.rand(12, 12, generator=generator).tolist()

    def loss(kept):
        gone = set(range(12)) - set(kept)
        return sum(worth[e] for e in gone) + 0.1 * sum(pairs[a][b] for a in gone for b in gone)

    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    best = exact(loss, groups, 6)
    assert best.tried == 6**3
    for width in (1, 8):
        found = beam(loss, groups, 6, width, dict(enumerate(worth)))
        assert all(sum(e in group for e in found.kept) == 2 for group in groups)
        assert best.loss <= found.loss <= 1.3 * best.loss
        assert found.tried < best.tried


def test_a_layer_keeps_the_best_subset_and_says_so():
    routed = RoutedLayer("mixtral", num_local_experts=6)
    statistics, experts = statistics_of(routed.sample), routed.experts
    options = NAEE.Options()
    loss = SubsetLoss(routed.sample, range(6))
    with collect() as notes:
        terms = NAEE.prune(experts, statistics, 4, options)
    kept = min(itertools.combinations(range(6), 4), key=loss)
    gone = tuple(sorted(set(range(6)) - set(kept)))
    now = after(experts, terms)
    assert removed_members(now.values()) == gone
    assert len(notes) == 1
    assert f"keeps experts {', '.join(map(str, kept))}: exact search, 15 subsets" in notes[0]
    for name, bank in experts.items():
        for e in kept:
            assert torch.equal(now[name].materialise(e)[0], bank.materialise(e)[0])
    planned = NAEE.layout(on_meta(experts), 4, options)
    settings, costs = NAEE.sizes(on_meta(experts), options)
    assert settings == [1, 2, 3, 4, 5, DENSE]
    cost = costs[settings.index(4)]
    for found in (terms, planned):
        assert sum(t.parameters() for ts in found.values() for t in ts) == cost
    assert NAEE.same_size and NAEE.scope == "experts"


def test_keeping_all_is_the_identity():
    routed = RoutedLayer("mixtral")
    for size in (4, DENSE):
        terms = NAEE.prune(routed.experts, statistics_of(routed.sample), size, NAEE.Options())
        assert terms == {name: bank.terms for name, bank in routed.experts.items()}
        assert torch.equal(routed.run_with(terms), routed.run())


def test_a_second_pruning_takes_what_the_first_left():
    routed = RoutedLayer("mixtral", num_local_experts=6)
    statistics = statistics_of(routed.sample)
    first = NAEE.prune(routed.experts, statistics, 5, NAEE.Options())
    banks = after(routed.experts, first)
    assert NAEE.sizes(on_meta(banks), NAEE.Options())[0] == [1, 2, 3, 4, DENSE]
    second = NAEE.prune(banks, statistics, 3, NAEE.Options())
    gone = removed_members(after(banks, second).values())
    assert set(removed_members(banks.values())) < set(gone) and len(gone) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_experts(family):
    routed = RoutedLayer(family, tokens=20)
    settings, _ = NAEE.sizes(on_meta(routed.experts), NAEE.Options())
    size = settings[-2]
    options = NAEE.Options(tokens=20)
    terms = NAEE.prune(routed.experts, routed.statistics, size, options)
    assert routed.run_with(terms).isfinite().all()
    curve = NAEE.curve(routed.experts, routed.statistics, options)
    loss = SubsetLoss(routed.sample, range(len(routed.experts["experts.down"].terms[0].slots)))
    assert len(curve) == len(settings) and curve[-1] == loss.whole
    assert curve[-2] <= 2 * loss.energy


def test_options_of_the_search():
    logits, outputs = tokens(experts=8, seed=4)
    statistics = statistics_of(hand_made(logits, outputs))
    layer = make_layer(experts=8)

    def said(**options):
        with collect() as notes:
            NAEE.prune(layer, statistics, 4, NAEE.Options(**options))
        return notes[0]

    assert "exact search, 70 subsets" in said()
    assert "exact search, 70 subsets" in said(search="exact")
    assert "greedy search, 26 subsets" in said(subsets=69)
    assert "greedy search" in said(search="greedy")
    assert "beam search" in said(search="beam") != said(search="beam", width=2)
    for wrong in ({"width": 3}, {"search": "exact", "subsets": 5}):
        with pytest.raises(ValidationError, match="has no effect with search"):
            NAEE.Options(**wrong)
    fewer = statistics_of(hand_made(logits[:9], outputs[:9]), 9)
    NAEE.prune(layer, fewer, 4, NAEE.Options(tokens=9))
    assert NAEE.needs(layer["experts.down"].shape, "experts.down", NAEE.Options(tokens=9)) == [
        RoutedOutputs(9)
    ]
    assert NAEE.needs(layer["experts.up"].shape, "experts.up", NAEE.Options()) == []


def test_what_is_refused():
    layer = make_layer(experts=64)
    with pytest.raises(UserError, match=r"layer 3 would try 1.83e\+18 subsets"):
        NAEE.layout(layer, 32, NAEE.Options(search="exact"))
    with pytest.raises(UserError, match="has 64 experts and cannot keep 65"):
        NAEE.layout(layer, 65, NAEE.Options())
    for bank in layer.values():
        bank.groups = 8
    assert NAEE.sizes(layer, NAEE.Options())[0] == [16, 24, 32, 40, 48, 56, DENSE]
    with pytest.raises(UserError, match="divides its experts into 8 groups"):
        NAEE.layout(layer, 30, NAEE.Options())
