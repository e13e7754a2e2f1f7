"""Plans of published models from their true headers alone: seconds, and no weight is read."""

from __future__ import annotations

import json
import math

import pytest
from mctk.cli import main
from mctk.planning import Plan, describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.planning.true_configs import (
    DEEPSEEK_V2_LITE,
    MIXTRAL,
    QWEN3_30B_A3B,
)
from tests.planning.true_headers import write_model

GB = 10**9


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("true") / "mixtral", MIXTRAL)


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a weight file was opened for its weights")

    import transformers.modeling_utils

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)


def recipe(path, registry, remove=0.4, of="model", step=None, calibrated=True):
    data = {
        "model": str(path),
        "output": "never-written",
        "budget": {"remove": remove, "of": of},
        "steps": [step or {"decompose": "svd_llm"}],
    }
    if calibrated:  # 256 sequences of 2048 tokens; fetched by a run, not by a plan
        data["calibration"] = {"dataset": "wikitext2"}
    return load_recipe(data, registry=registry)


def check_budget(plan: Plan, described: dict, remove: float) -> None:
    original, planned = (described["sizes"][key]["parameters"] for key in ("original", "planned"))
    assert described["sizes"]["exact"]
    assert plan.allowed == math.floor((1 - remove) * plan.scope + 1e-6)
    attained = plan.scope - (original - planned)
    assert plan.allowed - 0.005 * plan.scope <= attained <= plan.allowed


def mixtral_by_hand() -> tuple[int, int, int]:
    """Parameters, active parameters and the experts' parameters."""
    hidden, intermediate, layers, vocabulary = 4096, 14336, 32, 32000
    expert = 3 * hidden * intermediate
    attention = 2 * hidden * hidden + 2 * hidden * (8 * 128)
    rest = layers * (attention + 8 * hidden + 2 * hidden) + hidden + 2 * vocabulary * hidden
    return rest + 8 * layers * expert, rest + 2 * layers * expert, 8 * layers * expert


def test_mixtral_is_what_everyone_knows(mixtral, registry):
    assert len(list(mixtral.glob("*.safetensors"))) == 19
    # Sparse: as long as the real ones, nothing on disk.
    files = [file.stat() for file in mixtral.glob("*.safetensors")]
    assert sum(f.st_size for f in files) > 93 * GB
    assert sum(512 * f.st_blocks for f in files) < 10**7
    sizes = make_plan(recipe(mixtral, registry), registry).original
    parameters, active, experts = mixtral_by_hand()
    assert sizes.parameters == parameters == 46_702_792_704
    assert sizes.active_parameters == active
    assert round(active / GB, 1) == 12.9
    assert sizes.expert_parameters == experts
    assert round(experts / GB, 1) == 45.1
    assert sizes.bytes == 2 * parameters
    assert sizes.expert_bytes == 2 * experts


@pytest.mark.parametrize("remove", [0.2, 0.4, 0.6])
def test_mixtral_by_svd_llm(mixtral, registry, remove):
    plan = make_plan(recipe(mixtral, registry, remove), registry)
    described = describe(plan)
    check_budget(plan, described, remove)
    planned = described["sizes"]["planned"]
    assert planned["bytes"] == 2 * planned["parameters"]  # plain storage: no positions
    assert planned["expert_bytes"] == 2 * planned["expert_parameters"]
    # Two experts of eight are met, before and after; all else is as it was.
    gone = described["sizes"]["original"]["parameters"] - planned["parameters"]
    original = described["sizes"]["original"]
    assert planned["active_parameters"] == original["active_parameters"] - gone // 4
    assert planned["macs_per_token"] == original["macs_per_token"] - gone // 4
    # Hidden-side moments for all banks, float32, and each expert's token count.
    moment = 32 * 8 * (4096**2 * 4 + 8)
    statistics = {row["need"]: row["bytes"] for row in described["statistics"]}
    assert statistics["SecondMoment(experts.gate, input)"] == moment
    assert statistics["SecondMoment(experts.down, output)"] == moment
    assert not any("experts.up" in need for need in statistics)  # the same inputs as gate's
    resources = described["resources"]
    hidden = 256 * 2048 * 4096 * 2  # all sequences' hidden states, bfloat16
    layer = 2 * (8 * 3 * 4096 * 14336)
    least = layer + 2 * hidden + 2 * 8 * 4096**2 * 4
    assert least < resources["peak_memory"] < 24 * GB
    assert resources["disk_temporary"] == hidden
    assert resources["disk_statistics"] == sum(statistics.values())
    assert planned["bytes"] <= resources["disk_output"]
    assert described["sweeps"] == 1 and described["weight_reads"] == 3


def test_mixtral_by_loss_is_a_bound(mixtral, registry):
    data = {
        "model": str(mixtral),
        "output": "never-written",
        "calibration": {"dataset": "wikitext2"},
        "budget": {"remove": 0.4, "of": "experts"},
        "allocate": {"method": "by_loss"},
        "steps": [{"decompose": "svd_llm"}],
    }
    sizes = describe(make_plan(load_recipe(data, registry=registry), registry))["sizes"]
    parameters, _, experts = mixtral_by_hand()
    assert not sizes["exact"] and sizes["planned"] is None
    assert sizes["bound"]["most"] == parameters - (experts - math.floor(0.6 * experts + 1e-6))
    assert sizes["bound"]["most"] - sizes["bound"]["least"] == int(0.005 * experts)


def test_the_command_plans_mixtral(mixtral, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mixtral.yaml"
    path.write_text(
        f"model: {mixtral}\ncalibration: {{dataset: wikitext2}}\n"
        "budget: {remove: 0.4, of: experts}\nsteps:\n  - decompose: svd_llm\n"
    )
    with pytest.raises(SystemExit) as exit:
        main(["plan", str(path), "--set", "budget.remove=0.2", "--json"])
    assert exit.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sizes"]["original"]["parameters"] == 46_702_792_704
    kept = plan["sizes"]["planned"]["expert_parameters"] / mixtral_by_hand()[2]
    assert 0.795 <= kept <= 0.8
    with pytest.raises(SystemExit):
        main(["plan", str(path)])
    out = capsys.readouterr().out
    assert "mixtral, 32 layers" in out and "46.7" in out
    assert "0-31" in out and "8 × 14336 × 4096" in out
    assert not (tmp_path / "runs").exists()


def test_qwen3_with_its_18867_tensors(registry, tmp_path):
    path = write_model(tmp_path / "qwen3", QWEN3_30B_A3B)
    plan = make_plan(recipe(path, registry), registry)
    assert len(plan.source.tensors) == 18867
    # On the hub: "30.5B in total and 3.3B activated".
    assert plan.original.parameters == 30_532_122_624
    hidden, layers = 2048, 48
    expert = 3 * hidden * 768
    attention = 2 * hidden * 4096 + 2 * hidden * 512 + 2 * 128
    rest = layers * (attention + 128 * hidden + 2 * hidden) + hidden + 2 * 151936 * hidden
    assert plan.original.active_parameters == rest + layers * 8 * expert
    assert plan.original.expert_parameters == layers * 128 * expert
    described = describe(plan)
    check_budget(plan, described, 0.4)
    # Fine-grained experts: the intermediate side, 768 wide, is the smaller one.
    needs = {row["need"]: row["bytes"] for row in described["statistics"]}
    assert needs["SecondMoment(experts.down, input)"] == 48 * 128 * (768**2 * 4 + 8)
    assert needs["SecondMoment(experts.gate, output)"] == 48 * 128 * (768**2 * 4 + 8)


def test_deepseek_v2_lite_with_its_dense_layer_and_shared_experts(registry, tmp_path):
    path = write_model(tmp_path / "deepseek", DEEPSEEK_V2_LITE)
    plan = make_plan(recipe(path, registry, 0.6), registry)
    assert plan.original.parameters == 15_706_484_224
    experts = 26 * 64 * 3 * 2048 * 1408
    assert plan.original.expert_parameters == experts
    assert plan.original.active_parameters == 15_706_484_224 - experts + experts * 6 // 64
    assert set(plan.targets[0]) == set(range(1, 27))  # layer 0 is dense
    check_budget(plan, describe(plan), 0.6)


def test_text_cannot_be_counted_without_a_tokenizer(registry, tmp_path):
    """Some families make a tokenizer of nothing where there are no files: that is none."""
    small = {**QWEN3_30B_A3B, "num_hidden_layers": 1, "num_experts": 8, "vocab_size": 1000}
    path = write_model(tmp_path / "small", small)
    text = tmp_path / "text.txt"
    text.write_text("some words")
    data = {
        "model": str(path),
        "calibration": {"text": str(text)},
        "budget": {"remove": 0.4, "of": "experts"},
        "steps": [{"decompose": "svd_llm"}],
    }
    plan = make_plan(load_recipe(data, registry=registry), registry)
    calibration = describe(plan)["calibration"]
    assert not calibration["checked"] and "no usable tokenizer" in calibration["why"]
