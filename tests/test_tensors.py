"""`mctk.apply`: a method on tensors does what its hooks do in a run, and refuses what it cannot."""

from __future__ import annotations

import mctk
import pytest
import torch
from mctk.statistics import ExpertFrequency, Fisher
from mctk.terms import Dense, LowRank


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted(bank, weight, x):
    """Squared error of the outputs of member 0."""
    return float((bank.apply(x, 0) - x @ weight.T).square().sum())


def test_a_matrix():
    weight = draw(12, 20)
    bank = mctk.apply("svd", weight, size=5)
    [term] = bank.terms
    assert isinstance(term, LowRank) and term.rank == 5 and bank.shape.members == 1
    approximation, bias = bank.materialise(0)
    values = torch.linalg.svdvals(weight.double())
    assert float((approximation - weight).square().sum()) == pytest.approx(
        float(values[5:].square().sum()), rel=1e-4
    )
    assert bias is None and bank.parameters() == 5 * (12 + 20)


def test_inputs_are_what_the_method_sees():
    weight, x = draw(12, 20), draw(300, 20, seed=1) * torch.logspace(0, -2, 20)
    plain = mctk.apply("svd", weight, size=5)
    aware = mctk.apply("decompose/svd_llm", weight, size=5, inputs=x)
    assert weighted(aware, weight, x) < 0.9 * weighted(plain, weight, x)
    # In shape [B, T, in] and as one tensor a member it is the same.
    again = mctk.apply("svd_llm", weight[None], size=5, inputs=[x.reshape(3, 100, 20)])
    assert torch.allclose(again.materialise(0)[0], aware.materialise(0)[0], atol=1e-6)
    # Magnitudes and energies are summed as well.
    scaled = mctk.apply("asvd", weight, size=5, inputs=x)
    assert weighted(scaled, weight, x) < weighted(plain, weight, x)
    [sparse] = mctk.apply("wanda", weight, size=0.5, inputs=x).terms
    assert sparse.kind == "sparse"


def test_a_share_takes_the_largest_size_within_it():
    weight = draw(2, 32, 48)
    bank = mctk.apply("svd", weight, size=0.5, rank_multiple=1)
    [term] = bank.terms
    assert term.rank == 32 * 48 // 2 // (32 + 48)
    pivoted = mctk.apply("svd", weight, size=0.5, rank_multiple=1, storage="pivoted")
    assert pivoted.terms[0].rank > term.rank
    assert pivoted.parameters() <= weight.numel() // 2


def test_a_layer_and_one_method_after_another():
    shapes = {"experts.gate": (24, 16), "experts.up": (24, 16), "experts.down": (16, 24)}
    layer = {name: draw(4, *shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
    counts = torch.tensor([4, 3, 2, 1])
    merged = mctk.apply("merge/frequency", layer, statistics={ExpertFrequency(): counts})
    assert list(merged) == list(layer)
    for name, bank in merged.items():
        base = (layer[name] * (counts / counts.sum())[:, None, None]).sum(0)
        assert torch.allclose(bank.terms[0].weight[0], base, atol=1e-5)
        assert torch.allclose(bank.materialise(2)[0], layer[name][2], atol=1e-5)
    x = {name: draw(200, weight.shape[-1]) for name, weight in layer.items()}
    small = mctk.apply("delta_svd", merged, size=4, inputs=x)
    for name, bank in small.items():
        assert [type(term) for term in bank.terms] == [Dense, LowRank]
        assert bank.terms[0].weight.equal(merged[name].terms[0].weight)
        assert bank.parameters() < layer[name].numel()


def test_experts_are_removed():
    layer = {"experts.up": draw(4, 8, 6), "experts.down": draw(4, 6, 8)}
    counts = torch.tensor([1, 9, 5, 0])
    found = mctk.apply("prune/frequency", layer, size=2, statistics={ExpertFrequency(): counts})
    for bank in found.values():
        assert [bank.materialise(e)[0] is not None for e in range(4)] == [False, True, True, False]


def test_weights_stay_as_they_are_and_half_precision_is_computed_in_float32():
    weight = draw(16, 16).bfloat16().requires_grad_()
    before = weight.detach().clone()
    bank = mctk.apply("svd", weight, size=16)
    assert bank.terms[0].dtype == torch.float32
    assert torch.allclose(bank.materialise(0)[0], before.float(), atol=1e-5)
    assert weight.detach().equal(before) and not bank.terms[0].tensors()["U"].requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "svdd", "size": 4}, r"no method 'svdd' \(did you mean 'svd'\?\)"),
        ({"name": "frequency"}, "in several stages; write merge/frequency or prune/frequency"),
        ({"name": "by_loss"}, "works on size curves, not on tensors"),
        ({"name": "svd"}, "size: decompose/svd needs one"),
        ({"name": "svd", "size": 0}, "size: 0 is no setting"),
        ({"name": "svd", "size": 1.5}, "size: 1.5 is no share between 0 and 1"),
        ({"name": "svd", "size": 0.01}, "keeps no less than 2.000 of linear"),
        ({"name": "rtn", "size": 4}, "size: quantize/rtn takes none"),
        ({"name": "rtn", "bit": 4}, r"unknown option of quantize/rtn \(did you mean 'bits'\?\)"),
        ({"name": "rtn", "bits": 5}, "bits.*should be 8, 4, 3 or 2"),
        ({"name": "svd_llm", "size": 4}, r"inputs: decompose/svd_llm needs SecondMoment"),
        ({"name": "svd_llm", "size": 4, "inputs": torch.ones(9, 7)}, r"takes \[T, 8\]"),
        ({"name": "fwsvd", "size": 4}, r"statistics: decompose/fwsvd needs ChannelFisher"),
        ({"name": "svd", "size": 4, "weights": torch.ones(3)}, r"have shape \[out, in\]"),
        ({"name": "svd", "size": 4, "weights": {}}, "give at least one bank"),
        ({"name": "svd", "size": 4, "original": torch.ones(2, 2)}, "other banks or shapes"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(mctk.UserError, match=message):
        mctk.apply(**{"weights": draw(8, 8), **arguments})


def test_other_statistics_are_given_by_need():
    weight = draw(8, 8)
    fisher = {Fisher("linear"): draw(1, 8, 8).square()}
    with pytest.raises(mctk.UserError, match="needs ChannelFisher"):
        mctk.apply("fwsvd", weight, size=2, statistics=fisher)
    [need] = mctk.method("fwsvd").needs(
        mctk.apply("svd", weight, size=2).shape, "linear", mctk.method("fwsvd").Options()
    )
    even = mctk.apply("fwsvd", weight, size=2, statistics={need: torch.ones(1, 8)})
    plain = mctk.apply("svd", weight, size=2)
    assert torch.allclose(even.materialise(0)[0], plain.materialise(0)[0], atol=1e-5)
    uneven = mctk.apply("fwsvd", weight, size=2, statistics={need: torch.logspace(0, -4, 8)[None]})
    assert not torch.allclose(uneven.materialise(0)[0], plain.materialise(0)[0], atol=1e-2)
