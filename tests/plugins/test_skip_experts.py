"""Dynamic expert skipping: thresholds, and the layer that skips."""

from __future__ import annotations

import numpy
import pytest
import torch
from d2moe_layer import after, make_layer, on_meta
from mctk.errors import UserError
from mctk.notes import collect
from mctk.statistics import LayerStatistics, RoutedOutputs
from mctk.terms import ExpertSkip, drop_members
from mctk_naee import methods
from mctk_naee.skip import thresholds
from routed_layer import RoutedLayer, hand_made

_, SKIP = methods()


def policy_of(terms):
    [policy] = [t for t in terms["experts.down"] if isinstance(t, ExpertSkip)]
    return policy


def statistics_of(sample):
    return LayerStatistics(3, {RoutedOutputs(16384): sample}, {"experts.down"})


@pytest.mark.parametrize("count", [7, 8])
@pytest.mark.parametrize("quantile", [0.5, 0.3, 1.0])
def test_thresholds_are_numpys_quantiles(count, quantile):
    weights = torch.rand(count, 3, generator=torch.Generator().manual_seed(count)) + 0.01
    ranked = -numpy.sort(-weights.double().numpy(), axis=1)
    expected = numpy.quantile(ranked[:, 1:] / ranked[:, :1], quantile, axis=0)
    assert thresholds(weights, quantile) == pytest.approx(expected.tolist())
    assert thresholds(torch.cat([weights, torch.zeros(5, 3)]), quantile) == pytest.approx(
        expected.tolist()
    )
    assert thresholds(torch.zeros(4, 3), quantile) == [0.0, 0.0]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_layer_skips_half_of_the_second_choices(family):
    routed = RoutedLayer(family, tokens=80)
    down = routed.experts["experts.down"]
    with collect() as notes:
        terms = SKIP.prune(routed.experts, statistics_of(routed.sample), None, SKIP.Options())
    policy = policy_of(terms)
    assert list(terms) == ["experts.down"] and terms["experts.down"][:-1] == down.terms
    assert policy.shares == pytest.approx((0.5, 0.5), abs=0.02)
    assert "of 2 experts a token" in notes[0]
    index, weights = routed.sample.route(range(down.shape.members))
    second, first = weights.sort(dim=1).values.unbind(1)
    ratio = second / first
    assert policy.ratios[0] == pytest.approx(float(numpy.median(ratio.numpy())), rel=1e-5)

    # The block's output is what the weights with the second one moved to the first give.
    skipping, plain = routed.run_with(terms), routed.run()
    same = (skipping - plain).abs().amax(1) < 1e-6
    assert torch.equal(same, ratio >= policy.ratios[0])
    row = int((~same).nonzero()[0])
    winner = index[row, weights[row].argmax()]
    total = float(weights[row].sum())
    others = plain[row] - (weights[row, :, None] * outputs_of(routed, row)[index[row]]).sum(0)
    expected = others + total * outputs_of(routed, row)[winner]
    assert torch.allclose(skipping[row], expected, atol=1e-4)


def outputs_of(routed, row):
    """All experts' outputs for one token, [E, H]."""
    from mctk.runtime import run_expert

    experts = routed.layer.get_submodule(routed.sites["experts.down"].module)
    count = routed.experts["experts.down"].shape.members
    x = routed.sample.inputs[row : row + 1]
    with torch.no_grad():
        return torch.cat([run_expert(experts, e, x) for e in range(count)])


def test_thresholds_are_those_among_the_experts_that_are_left():
    routed = RoutedLayer("mixtral", num_local_experts=6)
    pruned = {name: drop_members(bank, [1, 4]) for name, bank in routed.experts.items()}
    left = after(routed.experts, pruned)
    statistics = statistics_of(routed.sample)
    whole = policy_of(SKIP.prune(routed.experts, statistics, None, SKIP.Options()))
    fewer = policy_of(SKIP.prune(left, statistics, None, SKIP.Options()))
    _, weights = routed.sample.route([0, 2, 3, 5])
    assert list(fewer.ratios) == thresholds(weights, 0.5) != list(whole.ratios)


def test_options_and_layout():
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(hand_made(logits, torch.randn(40, 6, 5), top=3))
    layer = make_layer(experts=6)
    found = [
        policy_of(SKIP.prune(layer, statistics, None, SKIP.Options(quantile=q)))
        for q in (0.25, 0.5, 0.75)
    ]
    means = [sum(n * s for n, s in enumerate(policy.shares, 1)) for policy in found]
    assert means[0] > means[1] > means[2] >= 1
    assert [len(policy.ratios) for policy in found] == [2, 2, 2]
    assert all(policy.ratios[0] >= policy.ratios[1] for policy in found)
    planned = SKIP.layout(on_meta(layer), None, SKIP.Options())
    assert [t.kind for t in planned["experts.down"]] == ["dense", "skip"]
    assert policy_of(planned).nbytes() == 0
    shape = layer["experts.down"].shape
    assert SKIP.needs(shape, "experts.down", SKIP.Options(tokens=7)) == [RoutedOutputs(7)]
    assert SKIP.needs(shape, "experts.up", SKIP.Options()) == []


def test_what_is_refused():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    layer = make_layer()
    one = statistics_of(hand_made(logits, torch.randn(40, 4, 5), top=1))
    with pytest.raises(UserError, match="layer 3: a token chooses one expert"):
        SKIP.prune(layer, one, None, SKIP.Options())
    twice = after(layer, SKIP.layout(layer, None, SKIP.Options()))
    with pytest.raises(UserError, match="layer 3 skips experts already"):
        SKIP.layout(twice, None, SKIP.Options())
