"""What goes wrong during and after a run, and what must not be silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mctk.engine import run
from mctk.errors import UserError
from mctk.evaluate import evaluate_model
from mctk.hookspecs import Method, hookimpl
from mctk.planning import make_plan
from mctk.recipe import Evaluate, PerplexityText, load_recipe
from mctk.registry import Registry, load_plugins
from safetensors.torch import load_file, save_file

from tests.families import tiny
from tests.tiny_run import TEXT


@pytest.fixture(scope="module")
def registry():
    return load_plugins()


def go(path: Path, registry, cache: Path) -> dict:
    return run([load_recipe(path, registry=registry)], registry, cache=cache)[0]


def test_values_that_overflow_the_storage_dtype_are_refused(
    write_recipe, registry, cache, mixtral, tmp_path
):
    model = tmp_path / "large"
    shutil.copytree(mixtral, model)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if ".layers.1." in name and name.endswith("w2.weight"):
                tensors[name] = tensors[name] * 1e7
        save_file(tensors, file, metadata={"format": "pt"})
    path = write_recipe(
        model=str(model),
        dtype="float32",
        storage_dtype="float16",
        calibration=None,
        steps=[{"decompose": "svd"}],
    )
    with pytest.raises(UserError, match=r"experts\.down of layer 1 does not fit into float16"):
        go(path, registry, cache)


def test_the_trace_ends_with_the_terms_as_stored(write_recipe, registry, cache):
    """In float16 the stored terms are rounded; the last rows of the trace say by how much."""
    path = write_recipe(
        dtype="float32", storage_dtype="bfloat16", steps=[{"decompose": "svd_llm", "size":
        {"rank": 48}}], budget=None
    )  # fmt: skip
    for layer in go(path, registry, cache)["layers"]:
        before = {row["bank"]: row["bank_error"] for row in layer["trace"][:3]}
        after = {row["bank"]: row["bank_error"] for row in layer["trace"][3:]}
        assert {row["step"] for row in layer["trace"][3:]} == {"as stored"}
        assert before.keys() == after.keys()
        assert all(before[bank] < 1e-7 < after[bank] < 1e-3 for bank in before)


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_finished_run_with_a_damaged_file_is_made_again(
    write_recipe, registry, cache, tmp_path, damage
):
    path = write_recipe()
    go(path, registry, cache)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    before = shard.read_bytes()
    if damage == "gone":
        shard.unlink()
    else:
        cut = before[:-1]
        shard.write_bytes(cut if damage == "cut" else cut + bytes([before[-1] ^ 1]))
    go(path, registry, cache)
    assert shard.read_bytes() == before


def test_a_byte_budget_is_met_with_a_narrower_storage(write_recipe, registry, tmp_path, mixtral):
    from transformers import AutoModelForCausalLM

    model = tmp_path / "float32"
    wide = AutoModelForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    wide.save_pretrained(model, max_shard_size="400kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mixtral / name, model)
    path = write_recipe(
        model=str(model),
        storage_dtype="bfloat16",
        budget={"remove": 0.4, "of": "experts", "unit": "bytes"},
        steps=[{"decompose": "svd", "options": {"rank_multiple": 1}}],
        calibration=None,
    )
    plan = make_plan(load_recipe(path, registry=registry), registry)
    sizes = plan.solve()
    attained = plan.attained(plan.predict(sizes).as_dict())
    assert plan.allowed - 0.005 * plan.scope <= attained <= plan.allowed
    assert all(rank > 0 for rank in sizes.values())  # none was left dense


def test_an_infeasible_allocation_is_found_by_the_plan(write_recipe, registry):
    path = write_recipe(allocate={"method": "by_loss", "options": {"min_keep": 0.9}})
    with pytest.raises(UserError, match="min_keep"):
        make_plan(load_recipe(path, registry=registry), registry)


def test_every_target_must_match(write_recipe, registry):
    path = write_recipe(
        steps=[{"decompose": "svd_llm", "targets": ["experts.*", "attention.quer"]}]
    )
    with pytest.raises(UserError, match=r"matches attention\.quer \(did you mean"):
        make_plan(load_recipe(path, registry=registry), registry)


def test_more_experts_per_token_than_experts_are_refused(write_recipe, registry, tmp_path, mixtral):
    model = tmp_path / "greedy"
    shutil.copytree(mixtral, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 9}))
    with pytest.raises(UserError, match=r"config\.json: 9 experts per token, and layer 0 has 4"):
        make_plan(load_recipe(write_recipe(model=str(model)), registry=registry), registry)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3}, r"8 experts in 3 groups \(n_group\), which does not come out even"),
        ({"n_group": 8, "topk_group": 4}, r"groups \(n_group\) of one expert each"),
        ({"topk_group": 3}, r"2 groups \(n_group\), of which a token cannot use 3 \(topk_group\)"),
        (
            {"n_group": 4},
            r"groups of 2 experts, .* uses 1 .*too few for its 3 experts",
        ),
    ],
)
def test_groups_that_do_not_come_out_are_refused(write_recipe, registry, tmp_path, changes, words):
    """The plan says it; transformers would, somewhere in the run, as an invalid shape."""
    model = tmp_path / "grouped"
    tiny("deepseek_v3").save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    changed = {**config, "num_experts_per_tok": 3, **changes}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"config\.json: the router of layer 1 has {words}"):
        make_plan(load_recipe(write_recipe(model=str(model)), registry=registry), registry)


def test_fewer_layers_than_the_files_hold_are_refused(write_recipe, registry, tmp_path, mixtral):
    model = tmp_path / "shallow"
    shutil.copytree(mixtral, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"config\.json says 2 layers, and the files hold tensor"):
        make_plan(load_recipe(write_recipe(model=str(model)), registry=registry), registry)


def test_sequences_beyond_the_models_positions_are_warned_of(write_recipe, registry):
    path = write_recipe(
        evaluate={"perplexity": [{"text": str(TEXT / "test" / "bible.jsonl"), "length": 1024}]}
    )
    plan = make_plan(load_recipe(path, registry=registry), registry)
    assert any("1024 tokens" in warning and "512" in warning for warning in plan.warnings)


def test_a_model_that_lacks_tensors_is_not_measured(mixtral, tmp_path):
    model = tmp_path / "fewer"
    shutil.copytree(mixtral, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    text = PerplexityText(name="bible", text=[str(TEXT / "test" / "bible.jsonl")], length=64,
                          windows=2)  # fmt: skip
    with pytest.raises(UserError, match=r"no tensor for model\.layers\.3"):
        evaluate_model(model, Evaluate(perplexity=[text]), device="cpu", streamed=False)


@pytest.mark.parametrize("returned", [[None], 3])
def test_a_methods_own_error_names_method_bank_and_layer(write_recipe, cache, returned):
    class Odd(Method):
        stage, name, summary = "decompose", "odd", "Returns nonsense."

        def decompose(self, bank, statistics, size, options):
            return returned

    class Plugin:
        @hookimpl
        def methods(self):
            return [Odd()]

    registry = Registry([Plugin()])
    path = write_recipe(steps=[{"decompose": "odd"}], budget=None, calibration=None)
    with pytest.raises(UserError, match=r"decompose/odd on experts\.gate of layer 0 failed"):
        go(path, registry, cache)
