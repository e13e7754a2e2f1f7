"""Modules of packed terms: what is multiplied out, what is cast, what counts."""

from __future__ import annotations

import families
import pytest
import torch
from compression import compress, compressible, exact_terms
from mctk.runtime import TermExperts, TermLinear, tensor_elements
from mctk.terms import BankShape, Dense, PackedTensor, pack
from mctk.terms import packing as packing_module


@pytest.fixture
def packed():
    """A tiny Mixtral whose experts and output projections are packed, and its description."""
    model = families.tiny("mixtral")
    chosen = {
        path: {
            part: [pack(term, 4, 16, symmetric=False) for term in bank]
            for part, bank in exact_terms(module).items()
        }
        for path, module in compressible(model).items()
    }
    return model, compress(model, chosen)


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_only_experts_that_are_visited_are_multiplied_out(packed, monkeypatch):
    model, _ = packed
    experts = modules(model, TermExperts)[0]
    hidden = experts.shapes["down"].out_features
    seen = []
    honest = packing_module._values
    monkeypatch.setattr(
        packing_module, "_values", lambda *a: seen.append(tuple(a[-1])) or honest(*a)
    )
    index = torch.tensor([[2, 0], [2, 0], [0, 2]])
    experts(torch.randn(3, hidden), index, torch.full((3, 2), 0.5))
    # Gate, up and down of two experts, each once, one matrix at a time.
    assert len(seen) == 6 and all(len(shape) == 2 for shape in seen)


def test_bytes_and_scales_are_parameters(packed):
    """Those are what accelerate offloads."""
    model, _ = packed
    [linear, *_] = modules(model, TermLinear)
    held = {name: p.dtype for name, p in linear.named_parameters()}
    assert held == {
        "terms_0_weight_codes": torch.uint8,
        "terms_0_weight_scales": torch.float32,
        "terms_0_weight_zeros": torch.uint8,
    }
    assert not any(p.requires_grad for p in linear.parameters()) and not [*linear.buffers()]


def test_casting_a_model_casts_scales_and_leaves_codes(packed):
    model, _ = packed
    [linear, *_] = modules(model, TermLinear)
    before = linear.terms()[0]
    linear.to(torch.bfloat16)
    [after] = linear.terms()
    assert linear.dtype == after.dtype == torch.bfloat16
    assert torch.equal(after.weight.codes, before.weight.codes)
    x = torch.randn(2, linear.in_features, dtype=torch.bfloat16)
    assert torch.equal(linear(x), before.to(torch.bfloat16).apply(x, 0))


def test_each_tensor_counts_what_it_holds(packed):
    model, described = packed
    plain = families.tiny("mixtral")
    elements = tensor_elements(described)
    weights = sum(p.numel() for module in compressible(plain).values() for p in module.parameters())
    assert sum(elements.values()) == weights
    state = model.state_dict()
    assert {name for name in state if ".terms_" in name} == set(elements)
    [linear, *_] = modules(model, TermLinear)
    counts = list(linear.elements().values())
    assert counts == [linear.in_features * linear.out_features, 0, 0]


def test_packed_and_plain_terms_must_not_be_confused():
    shape = BankShape(1, 4, 8)
    plain = Dense(shape, [0], torch.randn(1, 4, 8))
    linear = TermLinear(8, 4, [pack(plain, 4).spec()])
    with pytest.raises(ValueError, match="linear: term 0 is"):
        linear.set_terms("linear", [plain])
    linear.set_terms("linear", [pack(plain, 4)])
    assert isinstance(linear.terms()[0].weight, PackedTensor)
