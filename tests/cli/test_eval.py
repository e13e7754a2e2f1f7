from __future__ import annotations

import json
from pathlib import Path

import pytest
from mctk.cli import main
from mctk.cli.eval import _sources
from mctk.errors import UserError
from tiny_checkpoint import save_checkpoint, words

TASKS = Path(__file__).parents[1] / "fixtures" / "tasks"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    directory = tmp_path_factory.mktemp("models")
    return tuple(str(save_checkpoint(directory / str(seed), seed)) for seed in (0, 1))


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "book.txt").write_text(words(100))
    return str(tmp_path / "book.txt")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["eval", *arguments])
    captured = capsys.readouterr()
    return exit.value.code, captured.out, captured.err


def test_a_baseline_is_compared_on_the_same_windows(capsys, models, text, tmp_path):
    file = tmp_path / "result.json"
    code, out, err = run(
        capsys, models[1], "--baseline", models[0], "--text", text, "--length", "16",
        "--device", "cpu", "--output", str(file),
    )  # fmt: skip
    assert code == 0, err
    assert "| book |" in out and "token_ppl/v1 window=16 stride=16" in out
    assert "Δ log-perplexity" in out and "in memory, float32 on cpu" in out
    assert "model: perplexity of book: 6/6" in err  # plain lines where there is no terminal
    found = json.loads(file.read_text())
    first, second = (found[side]["perplexity"]["book"] for side in ("baseline", "model"))
    assert found["paired"]["book"]["delta_log_ppl"] == pytest.approx(second["nll"] - first["nll"])


def test_json_streamed_quiet(capsys, models, text):
    code, out, err = run(
        capsys, models[0], "--text", f"set={text}", "--length", "16", "--windows", "2",
        "--streamed", "--device", "cpu", "--json", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads(out)["model"]
    assert found["mode"] == "streamed" and found["model"] == models[0]
    assert found["perplexity"]["set"]["windows"] == 2


def test_tasks_of_ones_own(capsys, models, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(TASKS.parents[2])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    code, out, err = run(
        capsys, models[0], "--tasks", "mctk_after", "--task-path", str(TASKS), "--device", "cpu",
        "--quiet",
    )  # fmt: skip
    assert code == 0, err
    assert "| mctk_after |" in out and "chance" in out and "±" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give something to measure"),
        (("--text", "x.txt", "--limit", "3"), "--limit has no effect without --tasks"),
        (("--text", "x.txt", "--num-fewshot", "3"), "--num-fewshot has no effect"),
        (("--text", "x.txt", "--task-path", "."), "--task-path has no effect"),
        (("--dataset", "wiki"), "no dataset is called 'wiki' (did you mean 'wikitext2'?)"),
        (("--text", "nothing/*.txt"), "no file matches"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(capsys, models, arguments, message):
    code, _, err = run(capsys, models[0], *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_missing_model(capsys, text, tmp_path):
    code, _, err = run(capsys, str(tmp_path / "none"), "--text", text)
    assert code == 2 and "no directory" in err


def test_names_of_texts(tmp_path):
    names = [name for name, _ in _sources(("a/b.jsonl", "c/*.txt", "*.txt", "n=d/*.txt"), ("ptb",))]
    assert names == ["b", "c", "text", "n", "ptb"]
    odd = tmp_path / "x=y.txt"
    odd.write_text("a")
    assert _sources((str(odd),), ())[0][0] == "x=y"
    with pytest.raises(UserError, match="two texts are called 'b'"):
        _sources(("a/b.txt", "c/b.txt"), ())
    with pytest.raises(UserError, match="called 'ptb' like the dataset"):
        _sources(("ptb.txt",), ("ptb",))
