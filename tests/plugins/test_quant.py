"""quantize/rtn: any terms, any targets, and after a decomposition."""

from __future__ import annotations

import json

import pytest
import torch
from mctk.checkpoint import open_source
from mctk.cli.inspect import inspect_model
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel
from mctk.terms import Bank, BankShape, Bias, Dense, LowRank, PackedTensor, pack, packed_bits
from mctk_quant.factors import even_columns
from mctk_quant.methods import Rtn, RtnOptions
from pydantic import ValidationError
from tiny_run import cache, mixtral, write_recipe  # noqa: F401

SHAPE = BankShape(3, 12, 20)


def make_bank(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def noise(*size):
        return torch.randn(*size, generator=generator)

    every = [0, 1, 2]
    base = Dense(SHAPE, [0, 0, 0], noise(1, 12, 20))
    delta = LowRank(SHAPE, every, every, U=noise(3, 12, 6), V=noise(3, 6, 20)).pivot()
    return Bank("experts.gate", 3, SHAPE, [base, delta, Bias(SHAPE, every, noise(3, 12))])


def quantized(bank, **options):
    found = Rtn().quantize({bank.name: bank}, None, None, RtnOptions(**options))
    return found[bank.name]


def test_every_kind_keeps_its_form():
    bank = make_bank()
    base, delta, bias = quantized(bank)
    assert [type(t) for t in (base, delta, bias)] == [Dense, LowRank, Bias]
    assert packed_bits(base) == packed_bits(delta) == [4] and packed_bits(bias) == []
    # Of the pivoted factor only what is stored is rounded; the identity stays exact.
    assert isinstance(delta.C, PackedTensor) and isinstance(delta.V, PackedTensor)
    left = delta.factors(1)[0]
    assert torch.equal(left[delta.pivots[1].long()], torch.eye(6))
    assert torch.equal(delta.pivots, bank.terms[1].pivots)


def test_bits_bound_the_error():
    bank = make_bank()
    exact = [bank.materialise(e)[0] for e in range(3)]
    errors = []
    for bits in (2, 3, 4, 8):
        now = Bank(bank.name, 3, SHAPE, quantized(bank, bits=bits))
        off = [now.materialise(e)[0] - exact[e] for e in range(3)]
        errors.append(sum(float(part.square().sum()) for part in off))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * sum(float(part.square().sum()) for part in exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grids_are_those_that_the_page_names(bits):
    """Where bfloat16 holds the scale: GPTQ's asymmetric grid; AWQ's step, the extreme a level."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    random = torch.Generator().manual_seed(bits)
    step = torch.tensor([0.03125, 0.5, 1.25])[:, None]
    zero = torch.randint(1, top + 1, (3, 1), generator=random)
    drawn = torch.randint(0, top + 1, (3, 20), generator=random)
    codes = torch.cat([torch.tensor([[0, top]] * 3), drawn], 1)
    inside = 0.4 * (2 * torch.rand(codes.shape, generator=random) - 1)
    inside[:, :2] = 0  # least and largest lie on levels, so the range is theirs
    weight = step * (codes - zero + inside).clamp(-zero, top - zero)
    bank = Bank("mlp.up", 0, BankShape(1, 3, 22), [Dense(BankShape(1, 3, 22), [0], weight[None])])

    [term] = quantized(bank, bits=bits, group=None, symmetric=False)
    assert torch.equal(term.materialise(0)[0], step * (codes - zero))
    # Symmetric: |e| = 2^(bits - 1) steps, on the side of e; opposite to it one level is missing.
    extreme = weight.gather(1, weight.abs().argmax(1, keepdim=True))
    scale = (extreme / -middle).bfloat16().float()
    levels = (weight / scale).round().clamp(-middle, middle - 1)
    [term] = quantized(bank, bits=bits, group=None)
    assert torch.equal(term.materialise(0)[0], scale * levels)


@pytest.mark.parametrize(
    "options",
    [{"bits": 3}, {"group": 7}, {"group": None}, {"symmetric": False}, {"only": ["dense"]}],
)
def test_each_option_changes_something(options):
    bank = make_bank()
    specs = [term.spec() for term in quantized(bank, **({"group": 8} | options))]
    assert specs != [term.spec() for term in quantized(bank, group=8)]


def test_only_chooses_terms_and_tensors():
    base, delta, bias = quantized(make_bank(), only=["lowrank.V", "bias.vector"])
    assert not packed_bits(base) and packed_bits(bias) == [4]
    assert not isinstance(delta.C, PackedTensor) and isinstance(delta.V, PackedTensor)
    with pytest.raises(UserError, match=r"only: 'lowrnk' is no kind of term \(did you mean"):
        quantized(make_bank(), only=["lowrnk"])
    with pytest.raises(
        UserError, match=r"experts\.gate in layer 3 stores no weights 'U', but V, C"
    ):
        quantized(make_bank(), only=["lowrank.U"])
    with pytest.raises(ValidationError):
        RtnOptions(bits=5)


def test_what_would_grow_stays():
    """A row of one element would pay a scale for it."""
    thin = LowRank(SHAPE, [0, 1, 2], [0, 1, 2], U=torch.randn(3, 12, 1), V=torch.randn(3, 1, 20))
    [term] = quantized(Bank("experts.gate", 3, SHAPE, [thin]))
    assert not isinstance(term.U, PackedTensor) and isinstance(term.V, PackedTensor)


def test_layout_is_what_will_be_stored():
    for options in ({}, {"bits": 3, "group": 7, "symmetric": False}, {"bits": 2, "group": None}):
        bank = make_bank()
        meta = Bank(bank.name, 3, SHAPE, [t.to(torch.bfloat16, "meta") for t in bank.terms])
        planned = Rtn().layout({bank.name: meta}, None, RtnOptions(**options))[bank.name]
        found = [term.to(torch.bfloat16) for term in quantized(bank, **options)]
        assert [t.spec() for t in planned] == [t.spec() for t in found]


def test_nan_is_refused():
    bank = make_bank()
    bank.terms[0].weight[0, 0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"experts\.gate of layer 3: the dense term's weight: holds"
    ):
        quantized(bank)


def test_quantised_matrices_are_what_is_written(write_recipe, cache):  # noqa: F811
    """Decompose, then quantise, experts and attention; the gate compares plan, files and logits."""
    path = write_recipe(
        steps=[
            {"decompose": "svd", "size": "auto", "options": {"rank_multiple": 1}},
            {"quantize": "rtn", "options": {"bits": 3, "group": 16}},
            {"quantize": "rtn", "targets": "attention.*", "options": {"bits": 8}},
        ],
        calibration=None,
        gate=True,
    )
    [metrics] = run([load_recipe(path)], load_plugins(), cache=cache)
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["gate"]["fresh_process_equal"] and metrics["gate"]["sizes_equal"]
    output = load_recipe(path).output
    config = json.loads((output / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    spec = modules["model.layers.0.mlp.experts"]["terms"]["up"][0]
    assert spec["kind"] == "lowrank" and set(spec["packing"]) == {"U", "V"}
    [spec] = modules["model.layers.1.self_attn.q_proj"]["terms"]
    assert spec["packing"]["weight"] == {"bits": 8, "group": 48, "shape": [1, 48, 48]}
    # Whoever inspects the files finds the same.
    sizes = inspect_model(StreamedModel(open_source(output)))["sizes"]
    assert sizes == metrics["sizes"]["attained"]
    original = metrics["sizes"]["original"]
    attained = metrics["sizes"]["attained"]
    assert attained["expert_parameters"] <= 0.6 * original["expert_parameters"]
    assert attained["bytes"] < attained["parameters"] * 2


def test_packing_a_packed_model_again_counts_once():
    bank = make_bank()
    once = Bank(bank.name, 3, SHAPE, quantized(bank, bits=8))
    again = quantized(once, bits=2)
    assert [packed_bits(t) for t in again] == [[2], [2], []]
    assert again[0].spec() == pack(bank.terms[0], 2).spec()


def factors(sharing="none", seed=0):
    """A low rank whose U carries singular values from 1 to 1/100."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.logspace(0, -2, 10)
    u, v = (1 if sharing == name else 3 for name in "UV")
    left = torch.linalg.qr(torch.randn(u, 12, 10, generator=generator)).Q * spectrum
    right = torch.linalg.qr(torch.randn(v, 20, 10, generator=generator)).Q.mT.contiguous()
    every, one = [0, 1, 2], [0, 0, 0]
    return LowRank(SHAPE, one if u == 1 else every, one if v == 1 else every, U=left, V=right)


@pytest.mark.parametrize("sharing", ["none", "U", "V"])
def test_even_columns_change_no_product(sharing):
    term = factors(sharing)
    even = even_columns(term)
    for member in range(3):
        torch.testing.assert_close(even.materialise(member)[0], term.materialise(member)[0])
    norms = even.U.square().sum(1).mean(0)
    if sharing == "U":
        assert even is term  # one U for three different V
    else:
        torch.testing.assert_close(norms, torch.ones(10))
    pivoted = term.pivot()
    assert even_columns(pivoted) is pivoted


def test_even_columns_round_better():
    def lost(term):
        exact = factors().materialise(1)[0]
        return float((pack(term, 4).materialise(1)[0] - exact).square().sum())

    assert lost(even_columns(factors())) < 0.8 * lost(factors())
    zero = factors()
    zero.U[:, :, 3] = 0
    assert even_columns(zero).U.isfinite().all()
