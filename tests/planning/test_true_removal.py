"""Plans that remove experts from published models, from their true headers alone."""

from __future__ import annotations

import json

import pytest
from mctk.errors import UserError
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe

from tests.planning.true_configs import (
    DEEPSEEK_MOE_16B,
    DEEPSEEK_V2_LITE,
    MIXTRAL,
    PHI35_MOE,
    QWEN2_57B_A14B,
    QWEN3_30B_A3B,
)
from tests.planning.true_headers import write_model
from tests.removal_method import registry as removal_registry

MODELS = {  # configuration, its key, experts, how many stay
    "mixtral": (MIXTRAL, "num_local_experts", 8, 6),
    "deepseek_v2": (DEEPSEEK_V2_LITE, "n_routed_experts", 64, 48),
    "qwen3": (QWEN3_30B_A3B, "num_experts", 128, 96),
    "qwen2": (QWEN2_57B_A14B, "num_experts", 64, 48),
    "phimoe": (PHI35_MOE, "num_local_experts", 16, 12),
    "deepseek_moe": (DEEPSEEK_MOE_16B, "n_routed_experts", 64, 48),
}


@pytest.fixture(scope="module")
def registry():
    return removal_registry()


def plan_for(path, registry, *steps, **keys):
    data = {"model": str(path), "output": "never-written", "steps": list(steps), **keys}
    return make_plan(load_recipe(data, registry=registry), registry)


def step(size="auto", method="remove", **more):
    return {"prune": method, "targets": ["experts.*"], "size": size, **more}


@pytest.mark.parametrize("name", MODELS)
def test_a_quarter_of_the_experts(name, tmp_path, registry, modules_cache):
    config, key, experts, left = MODELS[name]
    path = write_model(tmp_path / name, config)
    plan = plan_for(
        path,
        registry,
        step(),
        budget={"remove": 0.25, "of": "experts"},
        trust_remote_code=name == "deepseek_moe",
    )
    told = describe(plan)
    assert told["output"]["kind"] == "native" and told["sizes"]["exact"]
    assert plan.configs[left][key] == left
    assert {k for k in config if plan.configs[left][k] != config[k]} == {key}
    original, planned = told["sizes"]["original"], told["sizes"]["planned"]
    # Exactly a quarter of the experts and of the routers' rows, counted by hand.
    layers = sum("experts.down" in sites for sites in plan.sites)
    rows = layers * (experts - left) * config["hidden_size"]
    gone = original["expert_parameters"] * (experts - left) // experts
    assert original["parameters"] - planned["parameters"] == gone + rows
    # As many experts a token as before, so only the routers multiply less.
    assert original["macs_per_token"] - planned["macs_per_token"] == rows
    assert original["active_parameters"] - planned["active_parameters"] == rows


def test_attention_by_terms_beside_it(tmp_path, registry):
    path = write_model(tmp_path / "mixtral", MIXTRAL)
    svd = {"decompose": "svd", "targets": ["attention.q"], "size": {"rank": 256}}
    plan = plan_for(path, registry, step({"rank": 6}), svd)
    assert describe(plan)["output"]["kind"] == "mctk"
    assert plan.configs[6]["num_local_experts"] == 6


def test_some_layers_only(tmp_path, registry):
    path = write_model(tmp_path / "mixtral", MIXTRAL)
    plan = plan_for(path, registry, step({"rank": 6}, layers="8-31"))
    told = describe(plan)
    assert told["output"]["kind"] == "mctk" and told["sizes"]["exact"]
    rows = 24 * 2 * 4096
    experts = told["sizes"]["original"]["expert_parameters"] * 24 * 2 // (32 * 8)
    lost = told["sizes"]["original"]["parameters"] - told["sizes"]["planned"]["parameters"]
    assert lost == rows + experts


def test_below_the_experts_of_a_token(tmp_path, registry):
    path = write_model(tmp_path / "deepseek", DEEPSEEK_V2_LITE)
    with pytest.raises(UserError, match=r"steps\.0\.size.*5 experts in layer 1: a token uses 6"):
        plan_for(path, registry, step({"rank": 5}))
    with pytest.raises(UserError, match=r"key budget.*at most 9"):
        plan_for(path, registry, step(), budget={"remove": 0.95, "of": "experts"})


def test_a_configuration_that_does_not_say_the_number(tmp_path, registry):
    """The number of experts is the default: its key is added."""
    path = write_model(tmp_path / "mixtral", {**MIXTRAL, "num_hidden_layers": 2})
    config = json.loads((path / "config.json").read_text())
    del config["num_local_experts"]
    (path / "config.json").write_text(json.dumps(config))
    plan = plan_for(path, registry, step({"rank": 6}))
    assert plan.configs[6]["num_local_experts"] == 6
