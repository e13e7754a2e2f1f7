"""The D²-MoE recipes planned on the true headers of their models: no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from mctk.planning import Plan, describe, make_plan
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.planning.true_configs import (
    DEEPSEEK_MOE_16B,
    MIXTRAL,
    PHI35_MOE,
    QWEN2_57B_A14B,
)
from tests.planning.true_headers import write_model

pytestmark = pytest.mark.usefixtures("modules_cache")
RECIPES = Path(__file__).parents[2] / "recipes"
GB = 10**9


@dataclass(frozen=True)
class Model:
    """A model of the paper.

    Attributes:
        recipe: The recipe's name.
        config: Its config.json.
        parameters: How many it has, exactly.
        published: The same in billions, as on the hub.
        layers: Numbers of the layers with experts.
        experts: E.
        active: Experts that a token uses.
        hidden: H.
        intermediate: I of an expert.
        active_published: Parameters that a token meets in billions, as published.
    """

    recipe: str
    config: dict
    parameters: int
    published: float
    layers: range
    experts: int
    active: int
    hidden: int
    intermediate: int
    active_published: float


MODELS = {
    model.recipe: model
    for model in (
        Model("d2moe_mixtral", MIXTRAL, 46_702_792_704, 46.7, range(32), 8, 2, 4096, 14336, 12.9),
        Model("d2moe_phi35moe", PHI35_MOE, 41_873_153_344, 41.9, range(32), 16, 2, 4096, 6400, 6.6),
        Model(
            "d2moe_deepseek16b",
            DEEPSEEK_MOE_16B,
            16_375_728_128,
            16.4,
            range(1, 28),
            64,
            6,
            2048,
            1408,
            2.8,
        ),
        Model(
            "d2moe_qwen2_57b",
            QWEN2_57B_A14B,
            57_408_658_944,
            57.4,
            range(28),
            64,
            8,
            3584,
            2560,
            14.2,
        ),
    )
}


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("true")


def plan_of(directory: Path, registry, model: Model, *changes: str) -> Plan:
    path = directory / model.recipe
    if not path.exists():
        write_model(path, model.config)
    file = RECIPES / f"{model.recipe}.yaml"
    recipe = load_recipe(file, overrides=[f"model={path}", *changes], registry=registry)
    return make_plan(recipe, registry)


def pruned(model: Model) -> int:
    """Channels that 5 % are, in multiples of 8."""
    return model.intermediate - 8 * round(0.95 * model.intermediate / 8)


def even_rank(model: Model, keep: float) -> float:
    """The rank of every delta, were it not a whole number, from the budget alone."""
    hidden, intermediate, layers = model.hidden, model.intermediate, len(model.layers)
    rest = model.parameters - layers * model.experts * 3 * hidden * intermediate
    channels = intermediate - pruned(model)
    # Down's base keeps an energy for every channel beside its columns.
    bases = layers * (3 * channels * hidden + channels)
    left = math.floor(keep * model.parameters + 1e-6) - rest - bases
    return left / (layers * 3 * model.experts * (hidden + intermediate))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_papers_recipe_on_its_model(name, directory, registry):
    model = MODELS[name]
    plan = plan_of(directory, registry, model)
    described = describe(plan)
    original, planned = described["sizes"]["original"], described["sizes"]["planned"]
    # What the model is.
    assert plan.original.parameters == model.parameters
    assert round(model.parameters / GB, 1) == model.published
    assert round(original["active_parameters"] / GB, 1) == model.active_published
    assert original["bytes"] == 2 * model.parameters
    expert = 3 * model.hidden * model.intermediate
    assert original["expert_parameters"] == len(model.layers) * model.experts * expert
    # What is done to it: the experts of every layer that has them, and nothing else.
    steps = [(step["method"], step["banks"], step["layers"]) for step in described["steps"]]
    banks = ["experts.down", "experts.gate", "experts.up"]
    methods = ["merge/fisher", "decompose/delta_svd", "prune/semi_dynamic"]
    assert steps == [(method, banks, list(model.layers)) for method in methods]
    assert described["steps"][2]["options"]["static"] == 0.05
    assert described["steps"][2]["options"]["dynamic"] == 0.05
    assert described["steps"][1]["options"]["storage"] == "plain"
    # The budget, of the whole model, is met from below.
    assert described["sizes"]["exact"] and plan.scope == model.parameters
    assert plan.allowed == math.floor(0.6 * model.parameters + 1e-6)
    assert plan.allowed - 0.005 * model.parameters <= planned["parameters"] <= plan.allowed
    # Bases and deltas as the budget alone says: ranks lie around the even share, a step apart.
    rank = even_rank(model, 0.6)
    ranks = {row["setting"] for row in described["layers"]}
    assert ranks <= {8 * math.floor(rank / 8), 8 * math.ceil(rank / 8)}
    channels = model.intermediate - pruned(model)
    for row in described["layers"]:
        deltas = model.experts * row["setting"] * (model.hidden + model.intermediate)
        energy = channels if row["bank"] == "experts.down" else 0
        assert row["parameters"] == channels * model.hidden + energy + deltas
    assert len(described["layers"]) == 3 * len(model.layers)
    # One layer at a time: beside the hidden states far less memory than the model.
    resources = described["resources"]
    layer = 2 * model.experts * expert
    calibration = 512 * 2048 * model.hidden * 2
    assert layer < resources["peak_memory"] - 2 * calibration < original["bytes"] / 2
    # What enters every layer, the last one's output, and gradients.
    assert resources["disk_temporary"] >= (len(plan.sites) + 2) * calibration
    fisher = [row for row in described["statistics"] if row["need"].startswith("Fisher")]
    assert len(fisher) == 3


@pytest.mark.parametrize("remove", [0.2, 0.6])
def test_other_ratios_by_set(remove, directory, registry):
    model = MODELS["d2moe_mixtral"]
    plan = plan_of(directory, registry, model, f"budget.remove={remove}")
    described = describe(plan)
    planned = described["sizes"]["planned"]["parameters"]
    assert plan.allowed is not None
    assert plan.allowed - 0.005 * model.parameters <= planned <= plan.allowed
    rank = even_rank(model, 1 - remove)
    ranks = {row["setting"] for row in described["layers"]}
    assert ranks <= {8 * math.floor(rank / 8), 8 * math.ceil(rank / 8)}


def test_the_recipes_take_the_same_steps(registry):
    """Models differ, and whether their code must be trusted; what is done to them does not."""
    recipes = [load_recipe(RECIPES / f"{name}.yaml", registry=registry) for name in MODELS]
    first, *others = (recipe.model_dump(exclude={"model", "output"}) for recipe in recipes)
    for recipe, other in zip(recipes[1:], others, strict=True):
        remote = recipe.model == "deepseek-ai/deepseek-moe-16b-base"
        assert other.pop("trust_remote_code") == remote
        assert other == {k: v for k, v in first.items() if k != "trust_remote_code"}
    assert first["calibration"]["sequences"] == 512 and first["calibration"]["length"] == 2048
    assert first["budget"]["remove"] == 0.4 and first["budget"]["of"] == "model"


@pytest.mark.parametrize(
    ("remove", "ratio"), [(0.2, 0.6805), (0.4, 0.4734), (0.6, 0.2662), (0.7, 0.1626), (0.8, 0.0593)]
)
def test_delta_ratios_of_the_papers_table_12(remove, ratio, directory, registry):
    """With all of the 10 % that are pruned counted as removed, as the paper counts."""
    model = MODELS["d2moe_mixtral"]
    options = "steps.2.options={static: 0.1, dynamic: 0.0, channel_multiple: 1}"
    step = "steps.1.options={storage: plain, rank_multiple: 1}"
    plan = plan_of(directory, registry, model, f"budget.remove={remove}", options, step)
    ranks = [size for (number, _, _), size in plan.solve().items() if number == 1]
    mean = sum(ranks) / len(ranks)
    found = mean * (model.hidden + model.intermediate) / (model.hidden * model.intermediate)
    assert found == pytest.approx(ratio, abs=3e-4)
