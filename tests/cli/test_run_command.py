"""`mctk run`: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.mistakes import damage, each_damage, each_in_recipe, placed
from tests.tiny_run import TEXT


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_a_run_says_what_it_does_and_what_came_out(mctk, write_recipe, tmp_path):
    recipe = write_recipe(
        evaluate={
            "perplexity": [
                {"name": "bible", "text": str(TEXT / "test" / "bible.jsonl"), "length": 64,
                 "windows": 2}
            ]
        }
    )  # fmt: skip
    code, out, err = mctk("run", recipe, "--set", "budget.remove=0.6")
    assert code == 0, err
    for word in ("parameters", "active", "bible", str(tmp_path / "out")):
        assert word in out, word
    # Where there is no terminal: plain lines, no bars or colours.
    assert "calibrate" in err and "compress" in err and "layer 2" in err
    assert "\x1b" not in out + err and "\r" not in err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["budget"]["requested"] == "remove 60% of the experts' parameters"
    # The same again: finished, nothing is written.
    before = contents(tmp_path / "out")
    code, again, err = mctk("run", recipe, "--set", "budget.remove=0.6")
    assert code == 0 and "is finished already" in err and again == out
    after = contents(tmp_path / "out")
    assert {k: v for k, v in after.items() if k != "run.log"} == {
        k: v for k, v in before.items() if k != "run.log"
    }


def test_json_and_quiet(mctk, write_recipe, tmp_path):
    recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    output = tmp_path / "elsewhere"
    code, out, err = mctk(
        "run", recipe, "--quiet", "--json", "-o", output, "--seed", "3", "--dtype", "float32",
        "--storage-dtype", "float16", "--device", "cpu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    metrics = json.loads(out)
    assert metrics == json.loads((output / "metrics.json").read_text())
    recipe = metrics["recipe"]
    assert (recipe["seed"], recipe["dtype"], recipe["storage_dtype"]) == (3, "float32", "float16")
    assert not (tmp_path / "out").exists()


def test_what_others_may_read_names_no_path_of_this_machine(mctk, write_recipe, mixtral, tmp_path):
    text = str(TEXT / "test" / "bible.jsonl")
    recipe = write_recipe(
        steps=[{"decompose": "svd", "size": {"keep": 0.5}}],
        budget=None,
        evaluate={"perplexity": [{"text": text, "length": 64, "windows": 1}]},
    )
    assert (
        mctk("run", recipe, "--quiet", "-o", tmp_path / "out", "--set", f"model={mixtral}")[0] == 0
    )
    for name in ("README.md", "report.md", "recipe.yaml"):
        said = (tmp_path / "out" / name).read_text()
        for private in (mixtral.parent, tmp_path, TEXT, Path.home()):
            assert str(private) not in said, (name, private)
        assert "bible.jsonl" in said and mixtral.name in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"# {mixtral.name}, compressed by mctk" in card
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["model"]["path"] == str(mixtral) and metrics["model"]["name"] == mixtral.name


@each_in_recipe
def test_mistakes_are_one_line_with_their_place(
    refused, write_recipe, short, tmp_path, change, written, message
):
    recipe = write_recipe(**change)
    assert placed(recipe, written, message) in refused("run", recipe)
    assert not (tmp_path / "out").exists()


@each_damage
def test_damaged_models_are_refused_by_name(refused, write_recipe, mixtral, tmp_path, how):
    model, message = damage(mixtral, tmp_path / "damaged", how)
    assert message in refused("run", write_recipe(), "--model", model)
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe(refused, tmp_path):
    path = tmp_path / "none.yaml"
    assert refused("run", path) == f"Error: {path}: cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "budget.remov=0.6"], "--set budget.remov=0.6: key budget.remov: unknown key"),
        (["--set", "budget"], "--set budget: write it as KEY=VALUE"),
        (["--set", "steps.3.size=auto"], "--set steps.3.size=auto: steps has entries 0 to 0 only"),
        (["--dtype", "int8"], "--dtype: key dtype: should be"),
        (["--device", "tpu"], "--device: key device: 'tpu' is no device"),
    ],
)
def test_mistakes_on_the_command_line(refused, write_recipe, arguments, message):
    assert message in refused("run", write_recipe(), *arguments)


def test_options_that_click_checks(mctk, write_recipe):
    for arguments, message in (
        (["--seed", "x"], "'x' is not a valid integer"),
        (["--modle", "y"], "--model"),
    ):
        code, out, err = mctk("run", write_recipe(), *arguments)
        assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_an_output_that_holds_something_else(refused, write_recipe, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("months of work")
    recipe = write_recipe()
    assert "is not empty and holds no run of mctk" in refused("run", recipe)
    assert contents(output) == {"thesis.tex": b"months of work"}
    (tmp_path / "file").write_text("a file")
    assert "is a file, not a directory" in refused("run", recipe, "-o", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a file"


def test_an_output_that_holds_another_run(mctk, refused, write_recipe, mixtral, tmp_path):
    recipe = write_recipe(calibration=None, steps=[{"decompose": "svd"}])
    assert mctk("run", recipe, "--quiet")[0] == 0
    before = contents(tmp_path / "out")
    line = refused("run", recipe, "--set", "budget.remove=0.5")
    assert "holds another run (recipe.budget.remove: 0.4 there, 0.5 now)" in line
    other = shutil.copytree(mixtral, tmp_path / "other")
    assert "holds another run (" in refused("run", recipe, "--model", other)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("method", ["svd", "svd_llm"])
def test_nan_in_a_weight_names_file_and_tensor(
    mctk, refused, write_recipe, mixtral, tmp_path, method
):
    model = shutil.copytree(mixtral, tmp_path / "model")
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(n for n in index if "layers.1." in n and "experts.2." in n)
    file = model / index[name]
    good = file.read_bytes()
    tensors = load_file(file)
    tensors[name][3, 5] = torch.nan
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    save_file(tensors, file, metadata)
    changes = {} if method == "svd_llm" else {"calibration": None}
    recipe = write_recipe(model=str(model), steps=[{"decompose": method}], **changes)
    assert refused("run", recipe, "--quiet") == f"Error: {file}: tensor {name} holds NaN"
    assert not (tmp_path / "out" / "config.json").exists()  # nobody takes it for a model
    # Again: the same answer. With the file mended it is another model, which the directory says.
    assert refused("run", recipe, "--quiet").endswith("holds NaN")
    file.write_bytes(good)
    line = refused("run", recipe, "--quiet")
    assert "holds another run (model:" in line and "delete it" in line
    shutil.rmtree(tmp_path / "out")
    code, _, err = mctk("run", recipe, "--quiet")
    assert (code, err) == (0, "")


def test_debug_shows_the_traceback(mctk, write_recipe):
    code, _, err = mctk("run", write_recipe(model="/no/such/model"), "--debug")
    assert code == 2 and "Traceback" in err
