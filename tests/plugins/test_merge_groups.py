"""Groups of experts: who joins whom, what their average is, and when nothing changes."""

from __future__ import annotations

import pytest
import torch
from d2moe_layer import Tokens, activations, after, asked_for, make_layer, on_meta, output
from mctk.decompose import average
from mctk.errors import UserError
from mctk.linalg import agglomerate, cosines
from mctk.notes import collect
from mctk.statistics import ExpertFrequency, ExpertMeans, LayerStatistics, Moment, RouterLogits
from mctk.terms import DENSE, Bank, BankShape, Bias, Dense
from mctk_merge import grouping, methods
from mctk_merge.merging import seed_of
from pydantic import ValidationError

MERGES = {method.name: method for method in methods()}
NAMES = sorted(MERGES)


def measured(layer, tokens, logits=None):
    """What the methods may ask for."""
    experts = tokens.routing.shape[1]
    generator = torch.Generator().manual_seed(11)
    if logits is None:
        logits = torch.randn(len(tokens.x), experts, generator=generator)
    means = torch.stack(
        [
            layer["experts.down"].apply(activations(layer, tokens.x, e), e).mean(0)
            for e in range(experts)
        ]
    )
    values = {
        ExpertFrequency(): (tokens.routing > 0).sum(0),
        RouterLogits(): Moment((logits.T @ logits)[None], torch.tensor([len(tokens.x)])),
        ExpertMeans(): means,
    }
    return LayerStatistics(3, values, set(layer))


def run(name, layer, statistics, size, **options):
    method = MERGES[name]
    options = method.Options(**options)
    return method.merge(layer, asked_for(method, layer, statistics, options), size, options)


def slots_of(terms, name="experts.up"):
    return list(terms[name][0].slots)


def groups_of(terms):
    slots = slots_of(terms)
    return sorted([e for e, s in enumerate(slots) if s == slot] for slot in set(slots))


def permuted(layer, statistics, order):
    """The same layer with its experts in another order."""
    banks = {}
    for name, bank in layer.items():
        terms = [
            type(t)(t.shape, t.slots, (t.vector if isinstance(t, Bias) else t.weight)[order])
            for t in bank.terms
        ]
        banks[name] = Bank(name, bank.layer, bank.shape, terms)
    gram = statistics[RouterLogits()]
    values = {
        ExpertFrequency(): statistics[ExpertFrequency()][order],
        RouterLogits(): Moment(gram.value[:, order][:, :, order], gram.count),
        ExpertMeans(): statistics[ExpertMeans()][order],
    }
    return banks, LayerStatistics(3, values, set(layer))


# Groups.


def test_m_smoe_by_hand():
    frequency = torch.tensor([40, 10, 30, 20])
    assert grouping.dominant(frequency, 2) == [0, 2]
    # Expert 1's logits are those of 2, twice as large; expert 3's go with neither, less against 0.
    logits = torch.tensor([[1.0, 0.2, 0.1, -0.5], [0.0, 2.0, 1.0, -1.0], [0.1, 0.2, 0.1, -0.4]])
    similarity = cosines(logits.T @ logits)
    expected = torch.nn.functional.cosine_similarity(logits[:, :, None], logits[:, None], dim=0)
    assert torch.allclose(similarity.float(), expected, atol=1e-6)
    assert grouping.around([0, 2], similarity) == [[0, 3], [1, 2]]
    assert grouping.uncovered(frequency) == pytest.approx([0.6, 0.3, 0.1, 0.0])
    assert grouping.uncovered(torch.zeros(3)) == [0.0, 0.0, 0.0]


def test_logits_that_are_zero_are_like_none():
    similarity = cosines(torch.diag(torch.tensor([1.0, 0.0, 4.0])))
    assert torch.equal(similarity, torch.diag(torch.tensor([1.0, 0.0, 1.0])))


def test_equal_frequencies_take_the_first():
    assert grouping.dominant(torch.tensor([5, 7, 7, 5, 7]), 2) == [1, 2]


def test_hc_smoe_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    centers = 5 * torch.randn(3, 16, generator=generator)
    points = centers[[0, 1, 2, 1, 0, 2, 2]] + 0.01 * torch.randn(7, 16, generator=generator)
    expected = [[0, 4], [1, 3], [2, 5, 6]]
    for linkage in ("average", "complete", "ward", "single"):
        assert grouping.by_distance(points, 3, linkage, "euclidean") == expected
    assert grouping.by_distance(points, 3, "average", "cosine") == expected
    assert grouping.by_distance(points, 7, "average", "euclidean") == [[e] for e in range(7)]


def test_linkages_differ():
    """A chain is one cluster to single linkage; complete linkage cuts it in the middle."""
    line = torch.tensor([0.0, 1.0, 2.1, 3.3, 4.6, 6.0, 9.0])[:, None]
    single = grouping.by_distance(line, 2, "single", "euclidean")
    assert single == [[0, 1, 2, 3, 4, 5], [6]]
    assert grouping.by_distance(line, 2, "complete", "euclidean") == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("count", range(1, 8))
def test_there_are_as_many_groups_as_asked_for(count):
    points = torch.zeros(7, 4)
    for groups in (
        grouping.by_distance(points, count, "average", "euclidean"),
        grouping.at_random(7, count, seed=3),
        grouping.by_similarity(torch.eye(7), count),
        agglomerate(torch.zeros(7, 7), count, "ward"),
        grouping.around(list(range(count)), torch.eye(7)),
    ):
        assert len(groups) == count
        assert sorted(e for group in groups for e in group) == list(range(7))
        assert groups == sorted(sorted(group) for group in groups)
    sizes = [len(group) for group in grouping.at_random(7, count, seed=3)]
    assert max(sizes) - min(sizes) <= 1


# Averages.


def test_the_average_by_hand():
    stack = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    groups = [[0, 3], [1, 2]]
    assert average(stack, groups, [3, 0, 0, 1])[:, 0].tolist() == [2.5, 4.0]  # 1, 2: never used
    assert average(stack, groups, [1, 1, 3, 1])[:, 0].tolist() == [4.0, 4.5]


def test_a_group_of_one_is_its_member_bit_for_bit():
    stack = torch.randn(3, 4, 5).bfloat16()
    got = average(stack, [[0, 2], [1]], [1, 0, 2])
    assert torch.equal(got[1], stack[1].float())


@pytest.mark.parametrize("name", NAMES)
def test_as_many_groups_as_experts_change_nothing(name):
    layer, tokens = make_layer(bias=True), Tokens()
    statistics = measured(layer, tokens)
    assert run(name, layer, statistics, 4) == {}
    assert run(name, layer, statistics, DENSE) == {}
    assert MERGES[name].layout(on_meta(layer), DENSE, MERGES[name].Options()) == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("align", [True, False])
def test_identical_experts_merge_to_themselves(name, align):
    layer, tokens = make_layer(bias=True, spread=0.0), Tokens(shares=(0.1, 0.2, 0.3, 0.4))
    for bank in layer.values():
        bank.terms[1].vector[:] = bank.terms[1].vector[0]
    statistics = measured(layer, tokens)
    merged = after(layer, run(name, layer, statistics, 2, align=align))
    assert merged["experts.up"].parameters() * 2 == layer["experts.up"].parameters()
    assert torch.allclose(output(merged, tokens), output(layer, tokens), rtol=1e-6, atol=1e-6)


def test_permuted_copies_merge_to_themselves_once_aligned():
    layer, tokens = make_layer(bias=True), Tokens()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4))
    for name, bank in layer.items():
        dense, bias = bank.terms
        columns = name == "experts.down"
        dense.weight[1] = dense.weight[0][:, order] if columns else dense.weight[0][order]
        bias.vector[1] = bias.vector[0] if columns else bias.vector[0][order]
    values = {
        ExpertFrequency(): torch.tensor([5, 3, 9, 9]),
        RouterLogits(): Moment(
            torch.tensor([[1.0, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])[None],
            torch.tensor([1]),
        ),
    }
    statistics = LayerStatistics(3, values, set(layer))
    for align, close in ((True, True), (False, False)):
        merged = after(layer, run("m_smoe", layer, statistics, 3, align=align))
        assert slots_of(merged_terms(merged)) == [0, 0, 1, 2]
        assert torch.allclose(output(merged, tokens), output(layer, tokens), atol=1e-5) == close


def merged_terms(layer):
    return {name: bank.terms for name, bank in layer.items()}


def test_alignment_is_to_the_dominant_expert():
    """Which keeps its neurons where they are, and its weights if the others were never used."""
    layer, tokens = make_layer(), Tokens()
    statistics = measured(layer, tokens)
    values = {need: statistics[need] for need in statistics}
    values[ExpertFrequency()] = torch.tensor([0, 0, 8, 0])
    terms = run("m_smoe", layer, LayerStatistics(3, values, set(layer)), 1)
    for name, bank in layer.items():
        assert torch.equal(terms[name][0].weight[0], bank.terms[0].weight[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_that_calibration_never_used_keeps_weights(name):
    layer, tokens = make_layer(), Tokens()
    statistics = measured(layer, tokens)
    values = {need: statistics[need] for need in statistics}
    values[ExpertFrequency()] = torch.zeros(4, dtype=torch.int64)
    terms = run(name, layer, LayerStatistics(3, values, set(layer)), 2, align=False)
    assert all(bool(t.weight.any(dim=(1, 2)).all()) for bank in terms.values() for t in bank)


@pytest.mark.parametrize("name", ["m_smoe", "hc_smoe"])
@pytest.mark.parametrize("align", [True, False])
def test_groups_do_not_depend_on_the_order_of_the_experts(name, align):
    layer, tokens = make_layer(experts=6, bias=True), Tokens(experts=6, shares=(1, 2, 3, 4, 5, 6))
    statistics = measured(layer, tokens)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    terms = run(name, layer, statistics, 3, align=align)
    other = run(name, *permuted(layer, statistics, order), 3, align=align)
    for bank in layer:
        for before, now in zip(terms[bank], other[bank], strict=True):
            for place, e in enumerate(order.tolist()):
                for one, two in zip(before.materialise(e), now.materialise(place), strict=True):
                    assert (one is None) == (two is None)
                    if one is not None:
                        assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_exact(name):
    layer, tokens = make_layer(experts=5, bias=True), Tokens(experts=5)
    statistics = measured(layer, tokens)
    method = MERGES[name]
    settings, costs = method.sizes(on_meta(layer), method.Options())
    assert settings == [1, 2, 3, 4, DENSE]
    assert costs[-1] == sum(bank.parameters() for bank in layer.values())
    for size, cost in zip(settings[:-1], costs[:-1], strict=True):
        terms = run(name, layer, statistics, size)
        planned = method.layout(on_meta(layer), size, method.Options())
        assert set(planned) == set(terms) == set(layer)
        assert sum(t.parameters() for bank in terms.values() for t in bank) == cost
        for bank, found in terms.items():
            for term, meta in zip(found, planned[bank], strict=True):
                assert term.spec()["tensors"] == meta.spec()["tensors"]
        assert len(groups_of(terms)) == size


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("m_smoe", {"align": False}),
        ("m_smoe", {"weights": "mean"}),
        ("hc_smoe", {"align": True}),
        ("hc_smoe", {"weights": "mean"}),
        ("hc_smoe", {"linkage": "single"}),
        ("hc_smoe", {"linkage": "complete"}),
        ("hc_smoe", {"linkage": "ward"}),
        ("hc_smoe", {"metric": "cosine"}),
        ("average", {"group_by": "router"}),
        ("average", {"seed": 2}),
        ("average", {"weights": "mean"}),
        ("average", {"align": True}),
    ],
)
def test_every_option_changes_something(name, changes):
    found = []
    for seed in range(12):  # linkages often agree on few experts
        layer = make_layer(experts=9, seed=seed)
        statistics = measured(layer, Tokens(experts=9, seed=seed, shares=range(1, 10)))
        one, two = run(name, layer, statistics, 4), run(name, layer, statistics, 4, **changes)
        found.append(
            torch.equal(one["experts.up"][0].weight, two["experts.up"][0].weight)
            and slots_of(one) == slots_of(two)
        )
    assert not all(found)


def test_needs_follow_the_options():
    shape = BankShape(4, 8, 6)

    def needs(name, **options):
        method = MERGES[name]
        return set(method.needs(shape, "experts.up", method.Options(**options)))

    assert needs("m_smoe") == {ExpertFrequency(), RouterLogits()}
    assert needs("hc_smoe") == {ExpertFrequency(), ExpertMeans()}
    assert needs("hc_smoe", weights="mean") == {ExpertMeans()}
    assert needs("hc_smoe", weights="mean", align=True) == {ExpertMeans(), ExpertFrequency()}
    assert needs("average") == {ExpertFrequency()}
    assert needs("average", weights="mean") == set()
    assert needs("average", group_by="router") == {ExpertFrequency(), RouterLogits()}


def test_curves_are_scores_in_order():
    layer, tokens = make_layer(), Tokens()
    statistics = measured(layer, tokens)
    method = MERGES["m_smoe"]
    curve = method.curve(layer, statistics, method.Options())
    settings, _ = method.sizes(layer, method.Options())
    assert len(curve) == len(settings) and curve[-1] == 0.0
    frequency = sorted(statistics[ExpertFrequency()].tolist(), reverse=True)
    assert curve[0] == pytest.approx(1 - frequency[0] / sum(frequency))
    assert curve == sorted(curve, reverse=True)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValidationError, match="ward needs metric: euclidean"):
        MERGES["hc_smoe"].Options(linkage="ward", metric="cosine")
    with pytest.raises(ValidationError, match="seed has no effect with group_by: router"):
        MERGES["average"].Options(group_by="router", seed=1)
    layer = make_layer()
    method, options = MERGES["hc_smoe"], MERGES["hc_smoe"].Options()
    with pytest.raises(UserError, match=r"size: 5 groups in layer 3, whose 4 experts allow 1 to 4"):
        method.layout(layer, 5, options)
    bank = layer["experts.up"]
    split = [Dense(bank.shape, [0] * 4, bank.terms[0].weight[:1]), bank.terms[0]]
    rewritten = {**layer, "experts.up": Bank("experts.up", 3, bank.shape, split)}
    with pytest.raises(UserError, match=r"experts.up of layer 3 was rewritten .*merge comes first"):
        method.sizes(rewritten, options)
    with pytest.raises(UserError, match="has one member: merge needs two"):
        method.sizes(make_layer(experts=1), options)
    mixed = {**layer, "mlp.up": Bank("mlp.up", 3, *one_member())}
    with pytest.raises(UserError, match=r"has 1 members, experts\.gate 4"):
        method.sizes(mixed, options)


def one_member():
    shape = BankShape(1, 8, 6)
    return shape, [Dense(shape, [0], torch.zeros(1, 8, 6))]


def test_who_was_merged_is_said():
    layer, tokens = make_layer(experts=6), Tokens(experts=6)
    with collect() as notes:
        terms = run("average", layer, measured(layer, tokens), 4)
    several = [group for group in groups_of(terms) if len(group) > 1]
    said = ", ".join("+".join(map(str, group)) for group in several)
    assert notes == [f"4 groups: {said}; {4 - len(several)} alone"]


def test_every_layer_has_groups_of_its_own():
    draws = [grouping.at_random(16, 8, seed_of(layer, 0)) for layer in range(6)]
    assert len({str(groups) for groups in draws}) == 6
    assert grouping.at_random(16, 8, seed_of(2, 0)) == draws[2]
    assert grouping.at_random(16, 8, seed_of(2, 1)) != draws[2]
