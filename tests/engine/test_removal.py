"""Removed experts through the whole engine: native output, mctk's format, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.sweep import StreamedModel, stream_logits
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, save_remote, tiny, token_ids
from tests.native import plain_logits
from tests.removal_method import registry as removal_registry
from tests.tiny_run import DEMO

FRESH = {"fresh_process_equal": None}


@pytest.fixture(scope="module")
def registry():
    return removal_registry()


def step(size: Any = "auto", method: str = "remove", **more: Any) -> dict[str, Any]:
    return {"prune": method, "targets": ["experts.*"], "size": size, **more}


def save(family: str, path: Path, **changes: Any) -> Path:
    if family == "remote":
        save_remote(path, vocab_size=4096)
    else:
        tiny(family, vocab_size=4096, **changes).save_pretrained(path, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    return path


@pytest.fixture
def without_fresh_process(monkeypatch):
    """The gate's fresh process takes seconds; tests that load several results start one for all."""
    module = sys.modules["mctk.engine.finish"]
    monkeypatch.setattr(module, "check_fresh_process", lambda *arguments: FRESH)


@pytest.fixture
def go(write_recipe, registry, cache, tmp_path) -> Callable[..., dict[str, Any]]:
    def run_one(name: str, *steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
        keys = {"budget": None, "gate": True, "output": str(tmp_path / name), **keys}
        path = write_recipe(name, steps=list(steps), **keys)
        return run([load_recipe(path, registry=registry)], registry, cache=cache)[0]

    return run_one


def streamed(path: Path, ids: torch.Tensor, trust: bool = False) -> torch.Tensor:
    return torch.cat(list(stream_logits(StreamedModel(Source(path), trust_remote_code=trust), ids)))


def loaded(path: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits that `from_pretrained` gives with mctk, before and after it is saved again."""
    found = []
    for _ in range(2):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        with torch.no_grad():
            found.append(model.eval()(ids, use_cache=False).logits)
        path = path.parent / f"{path.name}-again"
        model.save_pretrained(path)
    return found


def check_loaded(path: Path) -> None:
    ids = token_ids()
    expected = streamed(path, ids)
    for logits in loaded(path, ids):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_families_with_fewer_experts_load_without_mctk(tmp_path, go, without_fresh_process):
    outputs = []
    for family in FAMILIES:
        model = save(family, tmp_path / "models" / family)
        keep = 6 if family == "deepseek_v3" else 3
        metrics = go(family, step({"rank": keep}), model=str(model))
        assert metrics["output_kind"] == "native", family
        assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"], family
        assert metrics["gate"]["streamed_equal"], family
        assert (
            metrics["sizes"]["attained"]["active_parameters"]
            < (metrics["sizes"]["original"]["active_parameters"])
        )
        errors = [row for layer in metrics["layers"] for row in layer["trace"]]
        assert errors and all(row["layer_error"] > 0 for row in errors)
        assert all(row["bank_error"] is None for row in errors)
        outputs.append(tmp_path / family)
        before = json.loads((model / "config.json").read_text())
        after = json.loads((outputs[-1] / "config.json").read_text())
        assert list(before) == list(after), family
        changed = {key for key in before if before[key] != after[key]}
        assert len(changed) == 1 and {after[key] for key in changed} == {keep}, family
    ids = token_ids()
    found = plain_logits(outputs, ids, save_again=tmp_path / "again")
    for path, logits in zip(outputs, found, strict=True):
        torch.testing.assert_close(logits, streamed(path, ids), rtol=1e-4, atol=1e-4)
    again = plain_logits([tmp_path / "again" / path.name for path in outputs], ids)
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)


def test_the_gate_loads_native_output_without_mctk(tmp_path, go):
    model = save("qwen2_moe", tmp_path / "model", torch_dtype="bfloat16")
    metrics = go("out", step({"keep": 0.75}), model=str(model))
    gate = metrics["gate"]
    assert gate["streamed_equal"] and gate["fresh_process_equal"]
    assert 0 <= gate["plain_error"] < 1e-2
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "import mctk" not in (tmp_path / "out" / "README.md").read_text()


def test_remote_code_keeps_its_list_of_experts(tmp_path, go, modules_cache, without_fresh_process):
    model = save("remote", tmp_path / "model")
    metrics = go("out", step({"rank": 5}), model=str(model), trust_remote_code=True)
    assert metrics["output_kind"] == "native"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["gate"]["streamed_equal"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_routed_experts"] == 5
    names = Source(tmp_path / "out").tensors
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in names
    assert "model.layers.1.mlp.experts.5.up_proj.weight" not in names


def test_fewer_experts_and_terms_elsewhere(tmp_path, go):
    """The experts stay ordinary tensors, config.json has their number, attention is of terms."""
    model = save("mixtral", tmp_path / "model")
    metrics = go(
        "out",
        step({"rank": 3}),
        {"decompose": "svd", "targets": ["attention.o"], "size": {"rank": 4}},
        model=str(model),
    )
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert set(config["quantization_config"]) >= {"modules"}
    assert "experts" not in config["quantization_config"]
    assert all(path.endswith("o_proj") for path in config["quantization_config"]["modules"])
    check_loaded(tmp_path / "out")


def test_fewer_experts_of_terms(tmp_path, go, without_fresh_process):
    model = save("gpt_oss", tmp_path / "model")
    metrics = go(
        "out",
        step({"rank": 3}),
        {"decompose": "svd", "targets": ["experts.*"], "size": {"rank": 8}},
        model=str(model),
    )
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    check_loaded(tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe", "remote"])
def test_layers_with_different_numbers(family, tmp_path, go, modules_cache, without_fresh_process):
    model = save(family, tmp_path / "model")
    remote = family == "remote"
    few, more = (4, 6) if family in ("deepseek_v3", "remote") else (2, 3)
    few = 3 if remote else few
    layers = ("1", "2") if family in ("deepseek_v3", "remote") else ("0", "1")
    metrics = go(
        "out",
        step({"rank": few}, layers=layers[0]),
        step({"rank": more}, layers=layers[1]),
        model=str(model),
        **({"trust_remote_code": True} if remote else {}),
    )
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["gate"]["streamed_equal"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    written = config["quantization_config"]["experts"]
    assert [entry["count"] for entry in written.values()] == [few, more]
    assert not config["quantization_config"]["modules"]
    if remote:
        return
    check_loaded(tmp_path / "out")


def test_only_some_layers(tmp_path, go):
    """The others keep what config.json says; terms may stand for the fewer experts."""
    model = save("mixtral", tmp_path / "model")
    metrics = go(
        "out",
        step({"rank": 2}, layers="1"),
        {"decompose": "svd", "targets": ["experts.*"], "layers": "1", "size": {"rank": 8}},
        model=str(model),
    )
    assert metrics["output_kind"] == "mctk"
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(config["quantization_config"]["experts"]) == ["model.layers.1"]
    check_loaded(tmp_path / "out")


def test_changed_weights_are_terms(tmp_path, go, without_fresh_process):
    """A method that changes what it keeps: the source's tensors would not be its result."""
    model = save("mixtral", tmp_path / "model")
    metrics = go("out", step({"rank": 3}, options={"stretch": 0.5}), model=str(model))
    assert metrics["output_kind"] == "mctk"
    assert metrics["gate"]["streamed_equal"]
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]


@pytest.mark.parametrize(("remove", "left", "coarse"), [(0.25, 3, False), (0.3, 2, True)])
@pytest.mark.parametrize("allocate", ["uniform", "by_loss"])
def test_one_size_for_all_layers_by_budget(
    remove, left, coarse, allocate, tmp_path, go, without_fresh_process
):
    """What is not a whole number of experts takes the next smaller number, in every layer."""
    metrics = go(
        "out",
        step(),
        budget={"remove": remove, "of": "experts"},
        allocate={"method": allocate},
        gate=False,
    )
    assert metrics["output_kind"] == "native"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_local_experts"] == left
    budget = metrics["budget"]
    # One number for "experts": router rows that went with them save nothing of their budget.
    sizes = metrics["sizes"]
    assert budget["original"] == sizes["original"]["expert_parameters"]
    assert budget["attained"] == sizes["attained"]["expert_parameters"] <= budget["allowed"]
    assert budget["coarse"] is coarse
    assert any("too coarse" in warning for warning in metrics["warnings"]) is coarse
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]


def test_sizes_of_their_own_may_differ(tmp_path, go, without_fresh_process):
    """Without `same_size` an allocator gives every layer its own number."""
    metrics = go(
        "out", step(method="remove_some"), budget={"remove": 0.34, "of": "experts"}, gate=False
    )
    assert metrics["output_kind"] == "mctk"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = [entry["count"] for entry in config["quantization_config"]["experts"].values()]
    assert config["num_local_experts"] == 4 and len(set(counts)) == 2


REFUSED = [
    ("mixtral", step({"rank": 1}), r"steps\.0\.size.*1 experts in layer 0: a token uses 2"),
    ("mixtral", step({"rank": 4}), r"steps\.0\.size.*4 is not a size here; there are 1, 2, 3"),
    ("deepseek_v3", step({"rank": 2}), r"steps\.0\.size.*2 experts in layer 1: the router has 2"),
    ("mixtral", step({"keep": 0.1}), r"steps\.0\.size.*below the smallest size, 0\.250"),
    (
        "deepseek_v3",
        step({"rank": 6}, options={"last": True}),
        r"layer 1: experts 6, 7 would go, and the router's 2 groups would keep different",
    ),
]


@pytest.mark.parametrize(("family", "asked", "message"), REFUSED)
def test_what_could_not_be_routed_is_refused(family, asked, message, tmp_path, go):
    model = save(family, tmp_path / "model")
    with pytest.raises(UserError, match=message):
        go("out", asked, model=str(model))
