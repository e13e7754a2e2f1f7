"""Models are built without weights, whatever their size."""

from __future__ import annotations

import families
import pytest
import torch
from mctk.errors import UserError
from mctk.models import bank_sites, build, find_layers, has_experts_interface, resolve_dtype


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_parameters_are_on_meta_and_computed_buffers_are_real(family):
    model = build(families.tiny_config(family), torch.bfloat16)
    real = families.tiny(family)
    assert all(p.is_meta for p in model.parameters())
    assert not model.training
    buffers, stored = dict(model.named_buffers()), set(model.state_dict())
    for name, expected in real.named_buffers():
        if name not in stored:
            assert torch.equal(buffers[name], expected), name
    assert has_experts_interface(model) == (family != "llama")
    if family != "llama":
        assert model.config._experts_implementation == "mctk"


def test_experts_larger_than_any_memory():
    config = families.tiny_config(
        "mixtral", num_local_experts=4096, hidden_size=32768, intermediate_size=65536
    )
    model = build(config, torch.bfloat16)
    assert bank_sites(find_layers(model)[1][0])["experts.down"].shape.members == 4096


def test_the_configuration_that_is_given_stays_as_it_is():
    config = families.tiny_config("mixtral", output_router_logits=True)
    before = config.to_dict()
    model = build(config, torch.float32)
    assert config.to_dict() == before
    assert not model.config.output_router_logits


def test_dtypes():
    config = families.tiny_config("mixtral")
    assert resolve_dtype("float16", config) is torch.float16
    assert resolve_dtype("auto", config) is torch.float32
    config.dtype = "bfloat16"
    assert resolve_dtype("auto", config) is torch.bfloat16


def test_a_configuration_of_no_language_model():
    config = families.tiny_config("mixtral", hidden_act="no_such")
    with pytest.raises(UserError, match="cannot build a causal language model of type 'mixtral'"):
        build(config, torch.float32)
