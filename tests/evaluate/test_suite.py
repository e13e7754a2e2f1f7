from __future__ import annotations

import json
from pathlib import Path

import pytest
from mctk.errors import UserError
from mctk.evaluate import compare, evaluate_model, loading
from mctk.recipe import Evaluate, PerplexityText
from tiny_checkpoint import save_checkpoint, words

TASKS = Path(__file__).parents[1] / "fixtures" / "tasks"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def section(tmp_path_factory) -> Evaluate:
    directory = tmp_path_factory.mktemp("text")
    texts = []
    for name, count, length in (("a", 100, 16), ("b", 70, 16), ("c", 50, 8)):
        (directory / f"{name}.txt").write_text(words(count, seed=count))
        texts.append(PerplexityText(text=[str(directory / f"{name}.txt")], length=length))
    return Evaluate(perplexity=texts)


def test_streamed_and_in_memory_agree_on_every_text(model, section):
    seen = []
    memory = evaluate_model(
        model, section, device="cpu", streamed=False, batch_size=4, report=lambda *x: seen.append(x)
    )
    assert ("perplexity of a", 6, 6) in seen
    streamed = evaluate_model(model, section, device="cpu", streamed=True, batch_size=4)
    assert (memory["mode"], streamed["mode"]) == ("in memory", "streamed")
    assert list(memory["perplexity"]) == list(streamed["perplexity"]) == ["a", "b", "c"]
    assert [entry["windows"] for entry in memory["perplexity"].values()] == [6, 4, 6]
    for name, entry in memory["perplexity"].items():
        other = streamed["perplexity"][name]
        assert entry["digest"] == other["digest"]
        assert entry["window_nll"] == pytest.approx(other["window_nll"], rel=1e-5)
    paired = compare(memory, streamed)
    assert paired["a"]["delta_log_ppl"] == pytest.approx(0, abs=1e-5)
    assert json.loads(json.dumps(memory)) == memory


def test_auto_streams_what_does_not_fit_and_says_so(model, section, monkeypatch):
    small = Evaluate(perplexity=section.perplexity[2:], tasks=["mctk_after"])
    monkeypatch.setattr(loading, "free_memory", lambda device: 1000)
    result = evaluate_model(model, small, device="cpu")
    assert result["mode"] == "streamed" and "are free on cpu" in result["mode_reason"]
    assert result["tasks"] == {} and "mctk_after were left out" in result["warnings"][0]
    with pytest.raises(UserError, match="tasks need the weights in memory"):
        evaluate_model(model, small, device="cpu", streamed=True)


def test_tasks_run_on_the_loaded_model(model, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(TASKS.parents[2])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    section = Evaluate(tasks=["mctk_after"], limit=4)
    result = evaluate_model(model, section, device="cpu", task_path=[TASKS], batch_size=2)
    assert result["tasks"]["mctk_after"]["samples"] == 4
    assert result["mode"] == "in memory" and result["perplexity"] == {}


def test_comparison_leaves_out_what_does_not_correspond(model, section):
    result = evaluate_model(model, section, device="cpu", dtype="bfloat16")
    assert result["dtype"] == "bfloat16"
    other = json.loads(json.dumps(result))
    other["perplexity"]["a"]["digest"] = "another"
    other["perplexity"]["b"]["window_nll"][0] = None
    assert list(compare(result, other)) == ["c"]


def test_a_device_that_is_not_there_and_a_missing_tokenizer(model, section, tmp_path):
    with pytest.raises(UserError, match="no such device 'gpu'"):
        evaluate_model(model, section, device="gpu")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(model / file)
    with pytest.raises(UserError, match="no usable tokenizer"):
        evaluate_model(tmp_path, section, device="cpu")


def test_free_memory_is_a_number_of_bytes():
    assert loading.free_memory("cpu") > 1e6


def test_divergence_from_kept_logits(model, section, tmp_path):
    """In memory and streamed; of a model from itself there is none."""
    other = save_checkpoint(tmp_path / "other", seed=1)
    asked = Evaluate(perplexity=section.perplexity, divergence={"tokens": 3 * 32})
    kept = tmp_path / "logits"
    first = evaluate_model(model, asked, device="cpu", keep=kept, batch_size=4)
    assert first["divergence"] == {} and kept.is_dir()
    same = evaluate_model(model, asked, device="cpu", against=kept, batch_size=4)
    found = same["divergence"]
    assert {name: len(entry["window_kl"]) for name, entry in found.items()} == {
        "a": 2, "b": 2, "c": 4,
    }  # fmt: skip
    assert all(entry["kl"]["value"] == 0 for entry in found.values())
    assert all(entry["agreement"]["value"] == 1 for entry in found.values())
    memory, streamed = (
        evaluate_model(other, asked, device="cpu", streamed=s, against=kept, batch_size=3)
        for s in (False, True)
    )
    for name, entry in memory["divergence"].items():
        assert entry["kl"]["value"] > 0.01
        assert entry["window_kl"] == pytest.approx(
            streamed["divergence"][name]["window_kl"], rel=1e-3
        )
        assert entry["window_same"] == streamed["divergence"][name]["window_same"]


def test_speed_and_peak_memory_when_asked(model, section):
    asked = Evaluate(
        perplexity=section.perplexity[:1],
        speed={"length": 8, "new": 3, "repeats": 2, "batch": 2},
    )
    seen = []
    found = evaluate_model(model, asked, device="cpu", check=seen.append)
    speed = found["speed"]
    assert speed["prefill"]["low"] <= speed["prefill"]["value"] <= speed["prefill"]["high"]
    assert speed["decode"]["value"] > 0
    assert speed["protocol"].startswith("speed/v1 batch=2 prompt=8 new=3 repeats=2 threads=")
    assert len(seen) == 1 and hasattr(seen[0], "forward")
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 1e7
    streamed = evaluate_model(model, asked, device="cpu", streamed=True)
    assert streamed["speed"] is None and "speed was not measured" in streamed["warnings"][0]
