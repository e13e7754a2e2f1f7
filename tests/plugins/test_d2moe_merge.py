"""Properties of the merges: exact, indifferent to the experts' order, clustered, aligned."""

from __future__ import annotations

import pytest
import torch
from d2moe_layer import (
    MERGES,
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
from mctk.statistics import ExpertFrequency, Fisher, LayerStatistics, SecondMoment
from mctk.terms import Bank, BankShape, Dense, LowRank
from mctk_d2moe.merges import FisherMerge, Mean, RegMean

SHARES = (0.1, 0.2, 0.3, 0.4)


def permuted(layer, tokens, order):
    """The same layer with its experts in another order, and tokens that follow them."""
    moved = with_weights(layer, lambda name, w: w[order])
    other = Tokens()
    other.x, other.routing = tokens.x, tokens.routing[:, order]
    return moved, other


@pytest.mark.parametrize("name", sorted(MERGES))
@pytest.mark.parametrize("options", [{}, {"bases": 2}, {"bases": 2, "align": True}])
@pytest.mark.parametrize("bias", [False, True])
def test_base_and_residual_are_the_experts_and_the_layout_is_right(name, options, bias):
    layer, tokens = make_layer(bias=bias), Tokens(shares=SHARES)
    method = MERGES[name]
    options = method.Options(**options)
    statistics = asked_for(method, layer, measure(layer, tokens), options)
    terms = method.merge(layer, statistics, None, options)
    planned = method.layout(on_meta(layer), None, options)
    assert list(terms) == list(planned) == list(layer)
    for bank, found in terms.items():
        base, residual, *biases = found
        assert base.weight.shape[0] == options.bases and base.dtype == torch.float32
        assert len(biases) == bias
        assert [t.spec()["tensors"] for t in found] == [t.spec()["tensors"] for t in planned[bank]]
        assert all(t.device.type == "meta" for t in planned[bank])
        if options.align:
            continue
        for e in range(4):
            own = layer[bank].terms[0].weight[e]
            assert torch.equal(residual.weight[e], own - base.materialise(e)[0])
            assert torch.allclose(after(layer, terms)[bank].materialise(e)[0], own, atol=1e-6)
    expected = output(layer, tokens)
    assert torch.allclose(output(after(layer, terms), tokens), expected, atol=1e-3)


def test_half_precision_experts_keep_float32_residuals():
    layer = make_layer()
    for bank in layer.values():
        bank.terms[0] = bank.terms[0].to(torch.bfloat16)
    terms = run("mean", layer, {})
    base, residual = terms["experts.up"]
    assert residual.dtype == base.dtype == torch.float32
    own = layer["experts.up"].terms[0].weight
    assert torch.equal(residual.weight, own.float() - base.weight)


def test_fisher_is_frequency_times_fisher_or_fisher_alone():
    layer, tokens = make_layer(), Tokens(shares=SHARES)
    statistics = measure(layer, tokens)
    weight = layer["experts.up"].terms[0].weight.double()
    for labels in ("data", "model"):
        fisher = statistics[Fisher("experts.up", labels=labels)].double()
        count = statistics[ExpertFrequency()].double()[:, None, None]
        both = (count * fisher * weight).sum(0) / (count * fisher).sum(0)
        alone = (fisher * weight).sum(0) / fisher.sum(0)
        got = base_of(run("fisher", layer, statistics, labels=labels), 0)
        assert torch.allclose(got.double(), both, atol=1e-6)
        got = base_of(run("fisher", layer, statistics, labels=labels, frequency=False), 0)
        assert torch.allclose(got.double(), alone, atol=1e-6)


def test_equal_fisher_and_frequency_give_the_mean():
    layer = make_layer()
    values = {Fisher(n): torch.full((4, *layer[n].terms[0].weight.shape[1:]), 0.2) for n in NAMES}
    values[ExpertFrequency()] = torch.full((4,), 9)
    statistics = LayerStatistics(3, values, set(layer))
    mean = run("mean", layer, {})
    for name in ("fisher", "frequency"):
        other = run(name, layer, statistics)
        for bank in NAMES:
            assert torch.allclose(other[bank][0].weight, mean[bank][0].weight, atol=1e-6)


def test_experts_without_tokens_do_not_count_and_without_any_it_is_the_mean():
    layer = make_layer()
    values = {Fisher(n): torch.zeros(4, *layer[n].terms[0].weight.shape[1:]) for n in NAMES}
    values[ExpertFrequency()] = torch.zeros(4, dtype=torch.long)
    statistics = LayerStatistics(3, values, set(layer))
    mean = run("mean", layer, {})
    for name in ("fisher", "frequency"):
        assert torch.equal(base_of(run(name, layer, statistics), 0), base_of(mean, 0))
    values[ExpertFrequency()] = torch.tensor([0, 0, 4, 0])
    statistics = LayerStatistics(3, values, set(layer))
    own = layer["experts.up"].terms[0].weight
    assert torch.equal(base_of(run("frequency", layer, statistics), 0), own[2])
    around = base_of(run("ties", layer, statistics, density=1e-9), 0)
    assert int((around != own[2]).sum()) == 3  # one entry of each of the others


@pytest.mark.parametrize("name", sorted(set(MERGES) - {"random"}))
@pytest.mark.parametrize("bases", [1, 2])
def test_permuting_experts_permutes_residuals_and_leaves_the_base(name, bases):
    order = [2, 0, 3, 1]
    layer, tokens = make_layer(), Tokens(shares=SHARES)
    statistics = measure(layer, tokens)
    moved, other = permuted(layer, tokens, order)
    values = dict(measure(moved, other).items())
    for need in values:
        if isinstance(need, Fisher):
            values[need] = statistics[need][order]
    terms = run(name, layer, statistics, bases=bases)
    again = run(name, moved, LayerStatistics(3, values, set(layer)), bases=bases)
    for bank in NAMES:
        for new, old in enumerate(order):
            assert torch.allclose(base_of(again, new, bank), base_of(terms, old, bank), atol=1e-5)
            residuals = again[bank][1].weight[new], terms[bank][1].weight[old]
            assert torch.allclose(*residuals, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MERGES))
def test_identical_experts_leave_nothing(name):
    layer, tokens = make_layer(spread=0.0), Tokens()
    terms = run(name, layer, measure(layer, tokens))
    for bank in NAMES:
        assert terms[bank][1].weight.abs().max() < (1e-5 if name == "regmean" else 1e-30)


# Options and mistakes.


def test_every_option_changes_something():
    layer, tokens = make_layer(experts=8, spread=1.0), Tokens(experts=8, count=60)
    statistics = measure(layer, tokens)

    def base(name, size=None, **options):
        terms = run(name, layer, statistics, size, **options)
        return torch.stack([base_of(terms, e) for e in range(8)])

    changes = [
        ("mean", {}, {"bases": 2}),
        ("mean", {"bases": 4}, {"bases": 4, "similarity": "output"}),
        ("mean", {}, {"align": True}),
        ("fisher", {}, {"frequency": False}),
        ("fisher", {}, {"labels": "model"}),
        ("regmean", {}, {"off_diagonal": 1.0}),
        ("ties", {}, {"density": 0.5}),
        ("random", {}, {"seed": 1}),
    ]
    for name, before, then in changes:
        assert not torch.allclose(base(name, **before), base(name, **then), atol=1e-3), (name, then)
    tried = [
        {s: base("mean", size, bases="auto", storage=s, min_rank=1) for s in ("plain", "pivoted")}
        for size in range(500, 900, 50)
    ]
    assert any(not torch.equal(both["plain"], both["pivoted"]) for both in tried)


def test_random_differs_between_banks_and_layers():
    layer = make_layer(spread=0.0)
    one = with_weights(layer, lambda name, w: torch.arange(4.0)[:, None, None].expand_as(w))
    terms = run("random", one, {})
    values = {name: float(terms[name][0].weight.mean()) for name in NAMES}
    assert len(set(values.values())) == 3
    moved = {name: Bank(name, 4, bank.shape, bank.terms) for name, bank in one.items()}
    assert float(run("random", moved, {})["experts.up"][0].weight.mean()) not in values.values()


def test_mistakes_are_named():
    layer, tokens = make_layer(), Tokens()
    statistics = measure(layer, tokens)
    two = {name: bank for name, bank in layer.items() if name != "experts.down"}
    down = {"experts.down": layer["experts.down"]}
    cases = [
        (two, {"align": True}, "but down is not among the targets"),
        (down, {"bases": 2, "similarity": "output"}, "similarity: output in layer 3"),
        (layer, {"bases": 4}, "bases: 4 in layer 3, whose 4 experts allow 1 to 3"),
        (layer, {"bases": 0}, "bases: 0 in layer 3, whose 4 experts allow 1 to 3"),
    ]
    for banks, options, message in cases:
        for call in (
            lambda banks=banks, options=options: run("mean", banks, statistics, **options),
            lambda banks=banks, options=options: Mean().layout(
                on_meta(banks), None, Mean.Options(**options)
            ),
        ):
            with pytest.raises(UserError, match=message):
                call()
    merged = after(layer, run("mean", layer, statistics))
    with pytest.raises(UserError, match=r"experts.gate of layer 3 was rewritten .* merge comes"):
        run("mean", merged, statistics)
    single = BankShape(1, 4, 4)
    bank = Bank("attention.q", 3, single, [Dense(single, [0], torch.ones(1, 4, 4))])
    with pytest.raises(UserError, match="one member"):
        run("mean", {"attention.q": bank}, statistics)
    shape = layer["experts.up"].shape
    factors = LowRank(shape, range(4), range(4), U=torch.ones(4, 8, 1), V=torch.ones(4, 1, 6))
    with pytest.raises(UserError, match="merge comes first"):
        run("mean", {"experts.up": Bank("experts.up", 3, shape, [factors])}, statistics)


def test_one_bank_can_be_merged_by_itself():
    layer, tokens = make_layer(), Tokens()
    terms = run("fisher", {"experts.up": layer["experts.up"]}, measure(layer, tokens), bases=2)
    assert list(terms) == ["experts.up"]


def test_needs():
    options = FisherMerge.Options(labels="model")
    shape = BankShape(4, 8, 6)
    assert FisherMerge().needs(shape, "experts.gate", options) == [
        ExpertFrequency(),
        Fisher("experts.gate", labels="model"),
    ]
    assert Mean().needs(shape, "experts.gate", Mean.Options()) == []
    options = RegMean.Options(bases="auto", similarity="output")
    assert RegMean().needs(shape, "experts.up", options) == [
        SecondMoment("experts.up", "input", pooled=True),
        SecondMoment("experts.up", "input"),
    ]
