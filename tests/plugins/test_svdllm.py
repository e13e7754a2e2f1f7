"""Properties of truncation-aware SVD: optimal for the outputs, on every expert's own tokens."""

from __future__ import annotations

import pytest
import torch
from mctk import decompose
from mctk.decompose import moment_need, moment_side
from mctk.errors import UserError
from mctk.linalg import metric_svd
from mctk.statistics import LayerStatistics, Moment, SecondMoment
from mctk.terms import DENSE, Bank, BankShape, Dense, LowRank
from mctk_svdllm.methods import SvdLlm, SvdLlmOptions
from pydantic import ValidationError

WIDE, TALL = (8, 20), (20, 8)  # the output side and the input side


def make_bank(size, members=3, seed=0, slots=None):
    generator = torch.Generator().manual_seed(seed)
    shape = BankShape(members, *size)
    slots = list(range(members)) if slots is None else slots
    weight = torch.randn(len(set(slots)), *size, generator=generator)
    return Bank("experts.down", 2, shape, [Dense(shape, slots, weight)])


def make_inputs(size, counts, seed=1):
    """Correlated tokens, other ones for each member: a list of [T, in]."""
    generator = torch.Generator().manual_seed(seed)
    into = size[1]
    scale = torch.logspace(0, -2, into)
    mix = torch.linalg.qr(torch.randn(into, into, generator=generator)).Q
    return [torch.randn(count, into, generator=generator) * scale @ mix for count in counts]


def measure(bank, inputs):
    """The statistics as the engine would collect them."""
    side = moment_side(bank.shape)
    rows = inputs
    if side == "output":
        rows = [x @ bank.materialise(e)[0].T for e, x in enumerate(inputs)]
    value = torch.stack([x.T @ x for x in rows])
    need = SecondMoment(bank.name, side)
    count = torch.tensor([len(x) for x in inputs])
    return LayerStatistics(bank.layer, {need: Moment(value, count)}, {bank.name})


def output_error(bank, terms, inputs, members=None):
    total = 0.0
    for member in range(bank.shape.members) if members is None else members:
        x = inputs[member].double()
        weight = bank.materialise(member)[0].double()
        new = sum(term.materialise(member)[0].double() for term in terms)
        total += float((x @ (weight - new).T).square().sum())
    return total


def least_error(weight, x, rank):
    """The optimum by a full SVD of the whitened matrix, in float64."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double())
    root = vectors * values.clamp(min=0).sqrt()
    sigma = torch.linalg.svdvals(weight.double() @ root)
    return float(sigma[rank:].square().sum())


def test_side_is_the_smaller_one_or_the_shared_one():
    assert moment_side(BankShape(8, 14336, 4096)) == "input"  # Mixtral gate
    assert moment_side(BankShape(8, 4096, 14336)) == "output"  # Mixtral down
    assert moment_side(BankShape(128, 2048, 768)) == "input"  # Qwen3-30B down
    assert moment_side(BankShape(128, 768, 2048)) == "output"  # Qwen3-30B gate
    assert moment_side(BankShape(64, 1024, 2048)) == "input"  # OLMoE gate
    shape = BankShape(8, 4096, 14336)
    assert SvdLlm().needs(shape, "experts.down", SvdLlmOptions()) == [
        SecondMoment("experts.down", "output", of="current")
    ]
    # What enters gate is the same whatever was done to the experts; what enters down is not.
    square = BankShape(8, 64, 64)
    assert moment_need("experts.gate", square) == SecondMoment("experts.gate", "input")
    assert moment_need("experts.down", square).of == "current"


@pytest.mark.parametrize("size", [WIDE, TALL, (16, 16)])
@pytest.mark.parametrize("storage", ["plain", "pivoted"])
def test_output_error_is_the_least_there_is(size, storage):
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    options = SvdLlmOptions(storage=storage)
    for rank in (1, 4, 7):
        terms = SvdLlm().decompose(bank, measure(bank, inputs), rank, options)
        assert isinstance(terms[0], LowRank)
        least = sum(least_error(bank.materialise(e)[0], inputs[e], rank) for e in range(3))
        assert output_error(bank, terms, inputs) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_curve_is_the_measured_error(size):
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    statistics = measure(bank, inputs)
    options = SvdLlmOptions(rank_multiple=1)
    settings, _ = SvdLlm().sizes({bank.name: bank}, options)
    curve = SvdLlm().curve({bank.name: bank}, statistics, options)
    assert len(curve) == len(settings)
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] == 0.0
    for rank, error in zip(settings, curve, strict=True):
        terms = SvdLlm().decompose(bank, statistics, rank, options)
        assert output_error(bank, terms, inputs) == pytest.approx(error, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_full_rank_is_the_identity(size):
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    for storage in ("plain", "pivoted"):
        options = SvdLlmOptions(storage=storage)
        (term,) = SvdLlm().decompose(bank, measure(bank, inputs), 8, options)
        for member in range(3):
            error = term.materialise(member)[0] - bank.materialise(member)[0]
            assert error.norm() < 1e-4 * bank.materialise(member)[0].norm()


def test_identity_moment_is_plain_svd():
    weight = make_bank(TALL).terms[0].weight[0]
    white = metric_svd(weight, input_moment=torch.eye(8))
    plain = metric_svd(weight)
    unseen = metric_svd(weight, input_moment=torch.zeros(8, 8))
    assert torch.allclose(white.spectrum, plain.spectrum, rtol=1e-6)
    for part in (white, unseen):
        u, v = part.factors(5)
        assert torch.allclose(u @ v, plain.factors(5)[0] @ plain.factors(5)[1], atol=1e-5)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_rotating_or_scaling_the_tokens_changes_nothing(size):
    bank, inputs = make_bank(size), make_inputs(size, [40, 40, 40])
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(3))).Q
    (term,) = SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions())
    for other in ([rotation @ x for x in inputs], [1000 * x for x in inputs]):
        (same,) = SvdLlm().decompose(bank, measure(bank, other), 4, SvdLlmOptions())
        for member in range(3):
            new, old = same.materialise(member)[0], term.materialise(member)[0]
            assert (new - old).norm() < 1e-3 * old.norm()


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("policy", ["pooled", "keep"])
def test_few_tokens_give_a_defined_result(size, policy):
    bank, inputs = make_bank(size), make_inputs(size, [0, 3, 100])
    options = SvdLlmOptions(few_tokens=policy)
    statistics = measure(bank, inputs)
    for storage in ("plain", "pivoted"):
        options = SvdLlmOptions(few_tokens=policy, storage=storage)
        (term,) = SvdLlm().decompose(bank, statistics, 5, options)
        assert all(t.isfinite().all() for t in term.tensors().values())
    curve = SvdLlm().curve(
        {bank.name: bank}, statistics, SvdLlmOptions(few_tokens=policy, rank_multiple=1)
    )
    assert curve == sorted(curve, reverse=True)


def test_without_tokens_pooled_is_the_layers_metric_and_keep_is_plain_svd():
    bank, inputs = make_bank(TALL), make_inputs(TALL, [0, 50, 100])
    weight = bank.materialise(0)[0]
    statistics = measure(bank, inputs)
    (pooled,) = SvdLlm().decompose(bank, statistics, 4, SvdLlmOptions())
    layer = torch.cat(inputs)
    assert output_error(bank, [pooled], [layer], [0]) == pytest.approx(
        least_error(weight, layer, 4), rel=1e-4
    )
    (kept,) = SvdLlm().decompose(bank, statistics, 4, SvdLlmOptions(few_tokens="keep"))
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(kept.materialise(0)[0], u[:, :4] * s[:4] @ v[:4], atol=1e-5)


def test_without_tokens_the_output_side_falls_back_to_plain_svd():
    bank, inputs = make_bank(WIDE), make_inputs(WIDE, [0, 50, 100])
    u, s, v = torch.linalg.svd(bank.materialise(0)[0], full_matrices=False)
    for policy in ("pooled", "keep"):
        options = SvdLlmOptions(few_tokens=policy)
        (term,) = SvdLlm().decompose(bank, measure(bank, inputs), 4, options)
        assert torch.allclose(term.materialise(0)[0], u[:, :4] * s[:4] @ v[:4], atol=1e-5)


def test_pooling_adds_exactly_the_missing_tokens():
    own, mean = 3.0 * torch.eye(4), torch.ones(4, 4)
    assert torch.equal(decompose.pooled_inputs(own, 6, 10, mean), own + 4 * mean)
    assert decompose.pooled_inputs(own, 10, 10, mean) is own
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    added = decompose.pooled_outputs(own, 6, 10, weight, 2.5) - own
    assert float(added.trace()) == pytest.approx(4 * 2.5)
    assert torch.equal(decompose.pooled_outputs(own, 6, 10, torch.zeros(4, 9), 2.5), own)
    assert [decompose.seen(0, 10), decompose.seen(5, 10), decompose.seen(20, 10)] == [0.0, 0.5, 1.0]


def test_every_option_changes_something():
    bank, inputs = make_bank(TALL), make_inputs(TALL, [5, 50, 100])
    statistics = measure(bank, inputs)

    def first(**options):
        (term,) = SvdLlm().decompose(bank, statistics, 4, SvdLlmOptions(**options))
        return term.materialise(0)[0]

    assert not torch.allclose(first(), first(few_tokens="keep"), atol=1e-3)
    assert not torch.allclose(first(), first(min_tokens=200), atol=1e-3)
    assert torch.allclose(first(min_tokens=5), first(few_tokens="keep"))


def test_error_policy_names_layer_bank_experts_and_tokens():
    bank, inputs = make_bank(TALL), make_inputs(TALL, [0, 50, 5])
    options = SvdLlmOptions(few_tokens="error")
    with pytest.raises(UserError, match=r"experts.down of layer 2: .* than 8 tokens: 0 \(0\), 2"):
        SvdLlm().decompose(bank, measure(bank, inputs), 4, options)
    with pytest.raises(UserError, match="than 6 tokens"):
        options = SvdLlmOptions(few_tokens="error", min_tokens=6)
        SvdLlm().curve({bank.name: bank}, measure(bank, inputs), options)
    options = SvdLlmOptions(few_tokens="error")
    SvdLlm().decompose(bank, measure(bank, make_inputs(TALL, [8, 8, 8])), 4, options)


def test_no_token_at_all_is_an_error():
    bank = make_bank(TALL)
    with pytest.raises(UserError, match="no calibration token reached it"):
        SvdLlm().decompose(bank, measure(bank, make_inputs(TALL, [0, 0, 0])), 4, SvdLlmOptions())


def test_bad_numbers_name_their_place():
    bank, inputs = make_bank(TALL), make_inputs(TALL, [50, 50, 50])
    inputs[1][3, 3] = float("nan")
    for call in (
        lambda: SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions()),
        lambda: SvdLlm().curve({bank.name: bank}, measure(bank, inputs), SvdLlmOptions()),
    ):
        with pytest.raises(UserError, match=r"experts.down of layer 2, matrix .: .* NaN"):
            call()


def test_merged_members_share_their_tokens():
    bank, inputs = make_bank(TALL, slots=[0, 1, 0]), make_inputs(TALL, [60, 80, 100])
    (term,) = SvdLlm().decompose(bank, measure(bank, inputs), 4, SvdLlmOptions())
    assert list(term.u_slots) == [0, 1, 0]
    both = torch.cat([inputs[0], inputs[2]])
    least = least_error(bank.materialise(0)[0], both, 4)
    assert output_error(bank, [term], inputs, [0, 2]) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_a_residual_is_decomposed_for_its_own_outputs(size):
    """After a merge the moment is that of what is left, and the base stays as it is."""
    bank, inputs = make_bank(size), make_inputs(size, [60, 80, 100])
    base = bank.terms[0].weight.mean(0, keepdim=True)
    residual = Dense(bank.shape, [0, 1, 2], bank.terms[0].weight - base)
    left = Bank(bank.name, 2, bank.shape, [residual])
    shared = Dense(bank.shape, [0, 0, 0], base)
    merged = Bank(bank.name, 2, bank.shape, [shared, residual])
    terms = SvdLlm().decompose(merged, measure(left, inputs), 4, SvdLlmOptions())
    assert terms[0] is shared
    least = sum(least_error(residual.weight[e], inputs[e], 4) for e in range(3))
    assert output_error(bank, terms, inputs) == pytest.approx(least, rel=1e-4)


def test_dense_needs_no_statistics_and_options_are_checked():
    bank = make_bank(TALL)
    nothing = LayerStatistics(2, {}, {bank.name})
    assert SvdLlm().decompose(bank, nothing, DENSE, SvdLlmOptions()) == bank.terms
    with pytest.raises(KeyError, match="needs"):
        SvdLlm().decompose(bank, nothing, 4, SvdLlmOptions())
    for wrong in ({"few_tokens": "drop"}, {"min_tokens": 0}, {"ridge": 1e-3}):
        with pytest.raises(ValidationError):
            SvdLlmOptions(**wrong)
