"""Whole runs from FP8 and MXFP4 checkpoints: results are ordinary, and bytes are told honestly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mctk.checkpoint import Source
from mctk.engine import run
from mctk.planning import describe, make_plan
from mctk.recipe import load_recipe
from mctk.sweep import StreamedModel, stream_logits
from safetensors.torch import load_file

from tests.families import tiny, token_ids
from tests.native import plain_logits
from tests.quantised_checkpoint import FILE, store_fp8, store_mxfp4, store_plain
from tests.removal_method import registry as removal_registry
from tests.tiny_run import DEMO, TEXT

SVD = {"decompose": "svd", "targets": "experts.*", "size": {"keep": 0.7}}


def save(path: Path, family: str, store: Callable, **changes: Any) -> dict[str, torch.Tensor]:
    tiny(family, vocab_size=4096, **changes).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    return store(path)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("sources") / "fp8"
    return path, save(path, "deepseek_v3", store_fp8)


@pytest.fixture(scope="module")
def registry():
    return removal_registry()


@pytest.fixture
def go(write_recipe, registry, cache) -> Callable[..., dict[str, Any]]:
    def run_one(**keys: Any) -> dict[str, Any]:
        path = write_recipe(**{"budget": None, "calibration": None, **keys})
        return run([load_recipe(path, registry=registry)], registry, cache=cache)[0]

    return run_one


@pytest.fixture
def plan(write_recipe, registry) -> Callable[..., Any]:
    def make(**keys: Any) -> Any:
        path = write_recipe(**{"budget": None, "calibration": None, **keys})
        return make_plan(load_recipe(path, registry=registry), registry)

    return make


def written(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in Source(path).files:
        found |= load_file(path / file)
    return found


def test_a_compressed_fp8_checkpoint_is_an_ordinary_one(fp8, go, tmp_path):
    """With calibration, evaluation of the original, the gate and its fresh process."""
    path, meant = fp8
    metrics = go(
        model=str(path),
        steps=[{"decompose": "svd_llm", "targets": "experts.*", "size": {"keep": 0.7}}],
        calibration={"text": str(TEXT / "calibration" / "*.jsonl"), "sequences": 4, "length": 32},
        evaluate={
            "perplexity": [
                {"text": str(TEXT / "test" / "bible.jsonl"), "length": 32, "windows": 2}
            ],
            "divergence": True,
        },
        gate=True,
    )
    assert metrics["gate"]["streamed_equal"] and metrics["gate"]["fresh_process_equal"]
    assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
    assert metrics["sizes"]["original"]["bytes"] == Source(path).nbytes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mctk"
    tensors = written(tmp_path / "out")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    kept = [name for name in meant if ".mlp.experts." not in name]
    assert len(kept) > 20
    assert all(torch.equal(tensors[name], meant[name].to(torch.bfloat16)) for name in kept)
    assert metrics["evaluation"]["original"]["mode"] == "in memory"
    warning = next(w for w in metrics["warnings"] if "larger than the source" in w)
    assert "FP8" in warning and "FP8" in (tmp_path / "out" / "report.md").read_text()
    source = metrics["quantised_source"]
    assert (source["format"], source["bytes"]) == ("FP8", Source(path).nbytes)
    assert source["dequantised_bytes"] == metrics["sizes"]["original"]["parameters"] * 2


def test_equal_to_a_run_from_the_dequantised_checkpoint(fp8, go, tmp_path):
    path, meant = fp8
    plain = store_plain(tmp_path / "plain", meant, path)
    go(model=str(path), steps=[SVD], output=str(tmp_path / "from_fp8"))
    go(model=str(plain), steps=[SVD], output=str(tmp_path / "from_plain"))
    for file in Source(tmp_path / "from_plain").files:
        first, second = (tmp_path / run / file for run in ("from_fp8", "from_plain"))
        assert first.read_bytes() == second.read_bytes()
    first, second = (
        json.loads((tmp_path / run / "config.json").read_text())
        for run in ("from_fp8", "from_plain")
    )
    assert first == second


def test_native_results_load_without_mctk(go, tmp_path):
    outputs = []
    for family, store, keep, changes in (
        ("deepseek_v3", store_fp8, 6, {}),
        ("gpt_oss", store_mxfp4, 3, {"intermediate_size": 64}),
    ):
        source, out = tmp_path / f"{family}-source", tmp_path / family
        meant = save(source, family, store, **changes)
        step = {"prune": "remove", "targets": ["experts.*"], "size": {"rank": keep}}
        metrics = go(model=str(source), steps=[step], output=str(out))
        assert metrics["output_kind"] == "native"
        assert metrics["sizes"]["planned"] == metrics["sizes"]["attained"]
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        tensors = written(out)
        assert not any(name.endswith(("_scale_inv", "_blocks", "_scales")) for name in tensors)
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        outputs.append(out)
    name = next(name for name in meant if ".experts." in name)
    assert tensors[name].shape[0] == 3
    rows = [torch.equal(tensors[name][0], row.to(torch.bfloat16)) for row in meant[name]]
    assert sum(rows) == 1
    ids = token_ids()
    for out, logits in zip(outputs, plain_logits(outputs, ids, "bfloat16"), strict=True):
        expected = torch.cat(list(stream_logits(StreamedModel(Source(out)), ids)))
        error = (logits - expected).double().square().sum() / expected.double().square().sum()
        assert float(error) < 1e-3


def test_a_plan_counts_parameters_dequantised_and_bytes_as_stored(fp8, plan):
    path, _ = fp8
    found = describe(plan(model=str(path), steps=[SVD]))
    original, planned = found["sizes"]["original"], found["sizes"]["planned"]
    stored = load_file(path / FILE)
    parameters = sum(t.numel() for n, t in stored.items() if not n.endswith("_scale_inv"))
    assert original["parameters"] == parameters
    assert original["bytes"] == sum(t.nbytes for t in stored.values())
    experts = [n for n in stored if ".mlp.experts." in n]
    assert original["expert_bytes"] == sum(stored[n].nbytes for n in experts)
    assert planned["bytes"] == 2 * planned["parameters"]
    first, second = found["warnings"]
    assert "the source stores its weights in FP8" in first and "bfloat16" in first
    assert "is larger than the source's" in second
    assert found["quantised_source"]["dequantised_bytes"] == 2 * parameters


def test_a_budget_in_bytes_is_of_the_bytes_that_the_source_takes(fp8, plan):
    path, _ = fp8
    steps = [{"decompose": "svd", "targets": "experts.*", "options": {"rank_multiple": 1}}]
    budget = {"keep": 0.9, "of": "experts", "unit": "bytes"}
    made = plan(model=str(path), steps=steps, budget=budget)
    assert made.scope == made.original.expert_bytes
    predicted = made.predict(made.solve())
    assert predicted.expert_bytes <= made.allowed == int(0.9 * made.scope)
    assert predicted.expert_bytes == made.attained(predicted.as_dict())
    assert predicted.expert_bytes > 0.85 * made.scope
    whole = plan(model=str(path), steps=steps, budget={"keep": 0.99, "unit": "bytes"})
    assert whole.predict(whole.solve()).bytes <= 0.99 * Source(path).nbytes
