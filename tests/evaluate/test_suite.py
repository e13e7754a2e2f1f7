from __future__ import annotations

import json
from pathlib import Path

import pytest
from mctk.errors import UserError
from mctk.evaluate import compare, evaluate_model, suite
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
    monkeypatch.setattr(suite, "free_memory", lambda device: 1000)
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
    assert suite.free_memory("cpu") > 1e6
