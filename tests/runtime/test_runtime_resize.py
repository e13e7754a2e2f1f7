"""Layers of other numbers of experts than config.json says: what a checkpoint may ask for."""

from __future__ import annotations

import copy

import pytest
from mctk.errors import CheckpointError
from mctk.models import find_router
from mctk.runtime import MctkConfig, resize, resized_entry
from mctk.runtime.quantizer import checkpoint_config

from tests.families import tiny

LAYER = "model.layers.1"


def entry(model, count=3):
    layer = model.get_submodule(LAYER)
    router = find_router(layer)
    return resized_entry(layer, router.module, count, router.tensors, router.counts)


def test_one_layer_is_smaller_and_the_others_are_not():
    model = tiny("gpt_oss")
    resize(model, {LAYER: entry(model)})
    small, whole = model.model.layers[1].mlp, model.model.layers[0].mlp
    assert small.router.weight.shape == (3, 32) and small.router.bias.shape == (3,)
    assert small.experts.gate_up_proj.shape[0] == small.experts.down_proj_bias.shape[0] == 3
    assert small.router.num_experts == small.experts.num_experts == 3
    assert whole.router.weight.shape == (4, 32) and whole.experts.num_experts == 4


def test_what_a_router_has_behind_its_experts_stays():
    """ZAYA's chooses among four experts and none, and asks its configuration for the number."""
    model = tiny("zaya")
    gate, config = model.model.layers[1].mlp.gate, model.config
    assert gate.balancing_biases.shape == (5,) and gate.num_router_classes == 5
    resize(model, {LAYER: entry(model)})
    assert gate.balancing_biases.shape == (4,)
    assert gate.router_mlp.out_proj.weight.shape == (4, gate.router_hidden_size)
    assert (gate.num_experts, gate.num_router_classes, gate.config.num_experts) == (3, 4, 3)
    assert model.model.layers[1].mlp.experts.down_proj.shape[0] == 3
    assert config.num_experts == model.model.layers[2].mlp.gate.num_experts == 4


def test_a_path_of_the_headless_model():
    model = tiny("mixtral").model
    resize(model, {LAYER: entry(tiny("mixtral"))})
    assert model.layers[1].mlp.gate.weight.shape == (3, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: must be a positive integer, not 0"),
        ({"count": 5}, r"tensors\.mlp\.gate\.weight: has 4 entries, the checkpoint 5 experts"),
        ({"tensors": {"mlp.gate.bias": 0}}, r"tensors\.mlp\.gate\.bias: the model has no such"),
        ({"tensors": {"mlp.gate.weight": 2}}, r"tensors\.mlp\.gate\.weight: .* \(2\)"),
        ({"tensors": {"moe.gate.weight": 0}}, r"tensors\.moe\.gate\.weight: .* no such module"),
        ({"integers": ["mlp.gate.top"]}, r"integers\.mlp\.gate\.top: the model has no such"),
        ({"lists": ["mlp.experts"]}, r"lists\.mlp\.experts: the model has no list of 3 experts"),
        ({"extra": 1}, "must have count, integers, lists, tensors"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    model = tiny("mixtral")
    with pytest.raises(CheckpointError, match=f"experts of {LAYER}: {message}"):
        resize(model, {LAYER: {**entry(model), **change}})


def test_a_layer_that_is_not_there():
    model = tiny("mixtral")
    with pytest.raises(CheckpointError, match=r"experts of model\.layers\.7: module"):
        resize(model, {"model.layers.7": entry(model)})


def test_the_configuration_keeps_it():
    experts = {LAYER: entry(tiny("mixtral"))}
    config = checkpoint_config({"num_local_experts": 4}, {}, experts=experts)
    assert config["quantization_config"]["experts"] == experts
    assert MctkConfig(**copy.deepcopy(config["quantization_config"])).experts == experts
    assert "experts" not in checkpoint_config({}, {})["quantization_config"]
    with pytest.raises(CheckpointError, match=r"quantization_config\.experts: must map"):
        MctkConfig(experts=[1])
