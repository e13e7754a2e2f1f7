from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from families import tiny
from mctk.errors import UserError
from mctk.evaluate.harness import _guessing, load_tasks, match_tasks, run_tasks
from tiny_checkpoint import tokenizer

pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "fixtures" / "tasks"


@pytest.fixture
def from_root(monkeypatch, tmp_path):
    """The task's file names its data from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def by_hand(model, documents) -> float:
    """Accuracy of taking the choice with the largest log-likelihood."""
    right = 0
    for document in documents:
        scores = []
        for choice in document["choices"]:
            ids = tokenizer()(document["question"] + " " + choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -2]
            scores.append(logits.log_softmax(-1)[ids[0, -1]].item())
        right += scores.index(max(scores)) == document["answer"]
    return right / len(documents)


def test_a_local_task_runs_offline_and_agrees_with_a_computation_by_hand(from_root):
    import json

    lines = (TASKS / "after.jsonl").read_text().splitlines()
    model = tiny("mixtral")
    result = run_tasks(model, tokenizer(), load_tasks(["mctk_after"], [TASKS]), batch_size=4)
    entry = result["mctk_after"]
    expected = by_hand(model, [json.loads(line) for line in lines])
    assert entry["metrics"]["acc"]["value"] == pytest.approx(expected)
    assert entry["metrics"]["acc"]["stderr"] > 0
    assert set(entry["metrics"]) == {"acc", "acc_norm"}
    assert (entry["version"], entry["n_shot"], entry["samples"]) == (2.0, 0, 10)
    assert entry["chance"] == pytest.approx((9 / 4 + 1 / 3) / 10)
    assert entry["constant"] is False and entry["group"] is None
    json.dumps(result)

    loaded = load_tasks(["mctk_*"], [TASKS])
    few = run_tasks(model, tokenizer(), loaded, limit=3, num_fewshot=1)["mctk_after"]
    assert (few["samples"], few["n_shot"]) == (3, 1)


def test_unknown_tasks_are_named_with_their_nearest():
    known = ["hellaswag", "arc_easy", "arc_challenge"]
    assert match_tasks(["arc_*", "hellaswag", "arc_easy"], known) == [
        "arc_easy",
        "arc_challenge",
        "hellaswag",
    ]
    with pytest.raises(UserError, match=r"no task 'helaswag' \(did you mean hellaswag\?\)"):
        match_tasks(["helaswag"], known)
    with pytest.raises(UserError, match=r"no task 'zzz'; `lm-eval ls tasks`"):
        match_tasks(["zzz"], known)


def test_a_missing_directory_and_missing_data_are_user_errors(from_root, tmp_path):
    with pytest.raises(UserError, match="no directory"):
        load_tasks(["mctk_after"], [tmp_path / "none"])
    text = (TASKS / "after.yaml").read_text().replace("after.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    with pytest.raises(UserError, match="tasks mctk_after: cannot be loaded"):
        load_tasks(["mctk_after"], [tmp_path])


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    with pytest.raises(UserError, match="pip install"):
        load_tasks(["any"])


def test_a_model_that_always_gives_one_choice_is_found_out():
    def sample(*scores: float, metrics=("acc",)) -> dict:
        return {"filtered_resps": [(s, False) for s in scores], "metrics": list(metrics)}

    assert _guessing([sample(1, 0), sample(3, 2)]) == (0.5, True)
    assert _guessing([sample(1, 0), sample(2, 3)]) == (0.5, False)
    assert _guessing([sample(1, 0, 5, 5, metrics=("acc", "acc_mutual_info"))]) == (0.5, False)
    assert _guessing([]) == (None, None)
