"""`import mctk`: the commands as functions, with the same checks and the same results."""

from __future__ import annotations

import json
from pathlib import Path

import mctk
import pytest
import torch
from mctk.cli import main
from transformers import AutoModelForCausalLM

from tests.comparison.comparison_factory import comparison
from tests.families import tiny
from tests.tiny_run import TEXT, mixtral, write_recipe  # noqa: F401 (fixtures)

STEPS = [{"decompose": "svd", "options": {"rank_multiple": 1}}]
BUDGET = {"remove": 0.4, "of": "experts"}


@pytest.fixture
def recipe(mixtral):  # noqa: F811
    return {"model": str(mixtral), "budget": BUDGET, "steps": STEPS, "gate": False}


def test_a_plan_is_the_commands(write_recipe, capsys):  # noqa: F811
    path = write_recipe()
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--json", "--set", "budget.remove=0.3", "--seed", "4"])
    printed = json.loads(capsys.readouterr().out)
    planned = mctk.plan(recipe=path, set={"budget.remove": 0.3}, seed=4)
    assert json.loads(json.dumps(planned)) == printed
    assert planned["sizes"] != mctk.plan(recipe=str(path))["sizes"]


def test_a_run(recipe, mixtral, tmp_path, capsys):  # noqa: F811
    del recipe["model"]
    output = tmp_path / "out"
    run = mctk.compress(mixtral, recipe=recipe, output=output, cache=tmp_path / "cache")
    assert isinstance(run, mctk.CompressedModel) and run.path == output
    assert run.metrics == json.loads((output / "metrics.json").read_text())
    assert run.report == run._repr_markdown_() == (output / "report.md").read_text()
    said = capsys.readouterr()
    assert "layer 2" in said.err and not said.out
    assert recipe == {"budget": BUDGET, "steps": STEPS, "gate": False}  # the caller's, unchanged

    model = run.load(dtype=torch.float32)
    assert not model.training and type(model).__name__ == "MixtralForCausalLM"
    ids = torch.arange(8)[None]
    with torch.no_grad():
        again = mctk.load(output, dtype=torch.float32)(ids).logits
        assert model(ids).logits.equal(again)
        assert not mctk.load(mixtral, dtype=torch.float32)(ids).logits.allclose(again)

    finished = mctk.compress(
        mixtral, recipe=recipe, output=output, cache=tmp_path / "cache", progress=False
    )
    assert finished.metrics["sizes"] == run.metrics["sizes"]
    assert "layer 2" not in capsys.readouterr().err


def test_a_model_of_several_senses_comes_whole(tmp_path):
    whole = tiny("qwen3_5_moe")
    whole.save_pretrained(tmp_path)
    loaded = mctk.load(tmp_path)
    assert type(loaded) is type(whole)
    # The class that people try first loads the text model alone.
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is not type(whole)


def test_a_comparison_is_shown_as_its_tables():
    shown = comparison()._repr_markdown_()
    assert "\n| original " in shown and "SVD-LLM" in shown and shown.count("\n## ") > 3


def test_recipes_by_name_and_keys_of_their_own(mixtral, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    keys = {"set": {"budget": BUDGET, "steps.0.options.rank_multiple": 1}, "evaluate": None}
    planned = mctk.plan(mixtral, recipe="svdllm_mixtral", **keys)
    assert planned["output"]["path"] == "runs/svdllm_mixtral" and not planned["evaluation"]
    assert planned["calibration"]["sequences"] == 256
    text = {"text": TEXT / "calibration" / "code.jsonl", "sequences": 3, "length": 16}
    planned = mctk.plan(mixtral, recipe=Path("svdllm_mixtral"), calibration=text, **keys)
    assert planned["calibration"] == {**planned["calibration"], "sequences": 3, "checked": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devise": "cpu"}, r"devise='cpu': key devise: unknown key \(did you mean 'device'\?\)"),
        ({"set": {"budget.remov": 0.2}}, r"set budget.remov=0.2: .*did you mean 'remove'"),
        (
            {"set": {"steps.3.decompose": "svd"}},
            "set steps.3.decompose='svd': steps has entries 0 to 0 only",
        ),
        ({"budget": {"remove": "0.2"}}, "budget.remove: should be a valid number"),
        ({"model": "no/such/directory"}, "no directory no/such/directory"),
        ({"recipe": "d2moe_mixtra"}, r"d2moe_mixtra: cannot be read: .*'d2moe_mixtral'"),
        ({"recipe": {}}, "steps: give a list of steps"),
    ],
)
def test_mistakes_of_a_recipe(recipe, arguments, message):
    with pytest.raises(mctk.UserError, match=message):
        mctk.plan(**{"recipe": recipe, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perplexity": [{"dataset": "wikitext2", "lenght": 9}]}, "did you mean 'length'"),
        ({"perplexity": [{"text": "no/such.txt"}]}, "there is no file 'no/such.txt'"),
        ({"perplexity": [{"length": 9}]}, r"perplexity.0: give exactly one of text, dataset"),
        ({"limit": 3}, "limit has no effect without tasks"),
        ({"model": "./nowhere"}, "no directory"),
    ],
)
def test_mistakes_of_a_measurement(mixtral, arguments, message):  # noqa: F811
    with pytest.raises(mctk.UserError, match=message):
        mctk.measure(**{"model": mixtral, **arguments})


def test_a_comparisons_mistakes(write_recipe):  # noqa: F811
    with pytest.raises(mctk.UserError, match="key remov: unknown key"):
        mctk.compare([write_recipe()], remov=[0.2])
    with pytest.raises(mctk.UserError, match="give a comparison's file, or recipes"):
        mctk.compare([])


def test_names():
    assert set(mctk.__all__) <= set(dir(mctk))
    assert all(getattr(mctk, name) is not None for name in mctk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        mctk.compres  # noqa: B018
