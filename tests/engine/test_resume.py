"""A run killed at any moment goes on with the same command and ends with the same bytes.

The moments are the atomic commits: a child process runs the recipe and sends itself SIGKILL just
before or just after its n-th file gets its name. Between two commits nothing is on disk that a
later start would look at, so these moments stand for all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from mctk.engine import run
from mctk.engine.workspace import Workspace
from mctk.errors import UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.engine.conftest import DEMO, save_mixtral
from tests.families import tiny


def work(recipe: Path, cache: Path, output: Path, fatal: int | None, after: bool, count) -> None:
    """Runs a recipe; dies at its `fatal`-th commit if that is given."""
    replace = os.replace

    def counting(temporary: Path, path: Path) -> None:
        count.value += 1
        if count.value == fatal and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)
        if count.value == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting  # what gives every file of ours its name
    registry = load_plugins()
    run([load_recipe(recipe, registry=registry, output=str(output))], registry, cache=cache)


def start(recipe: Path, cache: Path, output: Path, fatal: int | None = None, after: bool = False):
    """Runs `work` in a forked child; returns its exit code and its number of commits."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    child = context.Process(target=work, args=(recipe, cache, output, fatal, after, count))
    child.start()
    child.join()
    return child.exitcode, count.value


def weights(output: Path) -> dict[str, bytes]:
    names = [*output.glob("*.safetensors"), output / "config.json"]
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture
def recipe(write_recipe):
    return write_recipe(allocate={"method": "by_loss"})


def check(recipe: Path, tmp_path: Path, moments: list[float]) -> None:
    code, commits = start(recipe, tmp_path / "cache0", tmp_path / "whole")
    assert code == 0
    expected = weights(tmp_path / "whole")
    for number, share in enumerate(moments):
        for after in (False, True):
            fatal = max(1, min(commits, round(share * commits)))
            cache, output = tmp_path / f"cache{number}{after}", tmp_path / f"out{number}{after}"
            code, _ = start(recipe, cache, output, fatal, after)
            assert code == -signal.SIGKILL, f"commit {fatal} of {commits}"
            code, again = start(recipe, cache, output)
            assert code == 0, f"commit {fatal} of {commits}"
            assert weights(output) == expected, f"commit {fatal} of {commits}"
            assert again < commits or fatal <= 2  # it did not begin again
            assert not list(output.rglob("*.tmp"))


def test_killed_runs_go_on_and_end_with_the_same_bytes(recipe, tmp_path):
    check(recipe, tmp_path, [0.15, 0.5, 0.8])


def test_killed_in_a_backward_sweep_whose_gradients_are_kept(write_recipe, tmp_path):
    steps = [{"decompose": "fwsvd", "options": {"rank_multiple": 1}}]
    check(write_recipe(steps=steps), tmp_path, [0.45])


def test_killed_where_more_than_hidden_states_is_carried(write_recipe, tmp_path):
    model = tmp_path / "model"
    tiny("mistral_large4", vocab_size=4096).save_pretrained(model, max_shard_size="200kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, model)
    low_rank = {"decompose": "delta_svd", "size": "auto", "options": {"rank_multiple": 1}}
    steps = [{**step, "targets": "experts.*"} for step in ({"merge": "fisher"}, low_rank)]
    recipe = write_recipe(model=str(model), steps=steps, budget={"remove": 0.3, "of": "experts"})
    check(recipe, tmp_path, [0.5])


@pytest.mark.slow
def test_killed_at_every_commit(recipe, tmp_path):
    _, commits = start(recipe, tmp_path / "cache", tmp_path / "count")
    check(recipe, tmp_path, [n / commits for n in range(1, commits + 1)])


def test_a_layer_that_was_damaged_is_written_again(recipe, tmp_path):
    assert start(recipe, tmp_path / "cache", tmp_path / "whole")[0] == 0
    expected = weights(tmp_path / "whole")
    code, _ = start(recipe, tmp_path / "cache", tmp_path / "out", 9, True)
    assert code == -signal.SIGKILL
    manifest = json.loads((tmp_path / "out" / ".mctk" / "manifest.json").read_text())
    for record in manifest["layers"].values():
        path = tmp_path / "out" / record["file"]
        path.write_bytes(path.read_bytes()[:-1])
    assert start(recipe, tmp_path / "cache", tmp_path / "out")[0] == 0
    assert weights(tmp_path / "out") == expected


def test_another_recipe_or_model_in_the_same_directory_is_refused(
    write_recipe, tmp_path, cache, mixtral
):
    registry = load_plugins()

    def go(**changes: object) -> None:
        path = write_recipe(**changes)
        run([load_recipe(path, registry=registry)], registry, cache=cache)

    go()
    before = weights(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds another run \(recipe.budget.remove: 0.4 there"):
        go(budget={"remove": 0.5, "of": "experts"})
    other = save_mixtral(tmp_path / "model", seed=1)  # at the path that the recipe named before
    shutil.copytree(mixtral, tmp_path / "kept")
    go(model=str(tmp_path / "kept"), output=str(tmp_path / "out2"))
    shutil.rmtree(tmp_path / "kept")
    other.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"holds another run \(model: "):
        go(model=str(tmp_path / "kept"), output=str(tmp_path / "out2"))
    assert weights(tmp_path / "out") == before


def test_a_second_run_at_once_is_refused_by_the_lock(tmp_path):
    first, second = Workspace(tmp_path / "out"), Workspace(tmp_path / "out")
    first.open({"recipe": 1})
    with pytest.raises(UserError, match="another run is at work"):
        second.open({"recipe": 1})
    first.close()
    second.open({"recipe": 1})
    second.close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty and holds no run"):
        Workspace(tmp_path).open({})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
