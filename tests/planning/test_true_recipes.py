"""The recipes for models that people have, planned on the true headers: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel

from tests.planning.test_true_deepseek_v3 import source as deepseek_source
from tests.planning.true_configs import GPT_OSS_20B, MIXTRAL, OLMOE, QWEN3_30B_A3B
from tests.planning.true_headers import write_model

RECIPES = Path(__file__).parents[2] / "recipes"
GB = 10**9
# Of 48 equal layers eight are planned: 30.53 B parameters and 61.06 GB, 1.24 GB of them embeddings
# and head, 57.98 GB experts.
LAYERS = 8
QWEN3 = {**QWEN3_30B_A3B, "num_hidden_layers": LAYERS}
QWEN3_SIZES = (0.622 + (30.532 - 0.622) * LAYERS / 48, 1.245 + (61.064 - 1.245) * LAYERS / 48)
QWEN3_EXPERTS = 57.98 * LAYERS / 48


@dataclass(frozen=True)
class Model:
    """What is known of a recipe's model, and of what the plan must say.

    Attributes:
        config: Its config.json.
        parameters: Published, in billions.
        nbytes: Of its files, in GB, as the hub shows them.
        kind: Of the output.
        written: The result in GB, counted by hand: what stays of the experts, and all else.
    """

    config: dict
    parameters: float
    nbytes: float
    kind: str
    written: float


MODELS = {
    "reap_qwen3_30b": Model(QWEN3, *QWEN3_SIZES, "native", QWEN3_SIZES[1] - 0.25 * QWEN3_EXPERTS),
    "d2moe_qwen3_30b": Model(QWEN3, *QWEN3_SIZES, "mctk", 0.6 * QWEN3_SIZES[1]),
    "naee_mixtral": Model(MIXTRAL, 46.7, 93.41, "native", 93.41 - 0.25 * 90.19),
    "mone_olmoe": Model(OLMOE, 6.92, 13.84, "mctk", 13.84 - 0.25 * 12.88),
    # Experts: 24 of 32 in 4.5 bits and biases in 16; all else as it was.
    "reap_gpt_oss_20b": Model(GPT_OSS_20B, 20.9, 13.76, "mctk", 0.75 * 19.11 * 4.5 / 8 + 3.62),
}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


@pytest.fixture(scope="module")
def told(tmp_path_factory, registry):
    """Recipe → what its plan says."""
    root, known = tmp_path_factory.mktemp("true"), {}

    def plan(name: str) -> dict[str, Any]:
        if name not in known:
            path = root / MODELS[name].config["model_type"]
            if not path.exists():
                write_model(path, MODELS[name].config)
            recipe = load_recipe(
                RECIPES / f"{name}.yaml", overrides=[f"model={path}"], registry=registry
            )
            known[name] = describe(make_plan(recipe, registry))
        return known[name]

    return plan


@pytest.mark.parametrize("name", MODELS)
def test_sizes(told, name):
    model, plan = MODELS[name], told(name)
    original, planned = plan["sizes"]["original"], plan["sizes"]["planned"]
    assert original["parameters"] / GB == pytest.approx(model.parameters, rel=0.002)
    assert original["bytes"] / GB == pytest.approx(model.nbytes, rel=0.002)
    assert plan["output"]["kind"] == model.kind
    assert planned["bytes"] / GB == pytest.approx(model.written, rel=0.003)


@pytest.mark.parametrize("name", MODELS)
def test_resources(told, name):
    """Less memory than a third of the model in 16 bits, but for what the calibration text takes."""
    plan = told(name)
    resources = plan["resources"]
    calibration = plan["calibration"]
    hidden = calibration["sequences"] * calibration["length"] * MODELS[name].config["hidden_size"]
    assert resources["peak_memory"] - 2 * 2 * hidden < 2 * plan["sizes"]["original"]["parameters"]
    assert resources["disk_output"] == plan["sizes"]["planned"]["bytes"]
    assert resources["disk_temporary"] >= 2 * hidden
    # Of a quantised source the plan says so; nothing else is surprising.
    assert len(plan["warnings"]) == ("quantization_config" in MODELS[name].config)


def test_half_of_deepseek_v3(tmp_path, registry):
    """Six of its layers, three of them with experts: in FP8, with groups and a prediction layer."""
    model = StreamedModel(deepseek_source(tmp_path / "v3", 6))
    recipe = load_recipe(
        RECIPES / "reap_deepseek_v3.yaml",
        overrides=[f"model={tmp_path / 'v3'}"],
        registry=registry,
    )
    plan = make_plan(recipe, registry, model=model)
    said = describe(plan)
    assert said["output"]["kind"] == "native" and said["quantised_source"]["format"] == "FP8"
    assert plan.configs[128]["n_routed_experts"] == 128
    assert plan.configs[128]["n_group"] == 8 and "quantization_config" not in plan.configs[128]
    assert {row["setting"] for row in said["layers"]} == {128}
    experts = said["sizes"]["original"]["expert_bytes"]
    # Half as many numbers of twice the bytes, scales aside.
    assert said["sizes"]["planned"]["expert_bytes"] / experts == pytest.approx(1, rel=0.001)
    assert [part["kept"] for part in said["unread"]["parts"]] == [False]
    layer = 256 * 3 * 2048 * 7168 * 2  # bytes of a layer's experts in bfloat16
    hidden = 1024 * 2048 * 7168 * 2
    least = 2 * layer + 2 * hidden
    assert least < said["resources"]["peak_memory"] < least + 8 * GB
