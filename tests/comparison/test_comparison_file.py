"""Comparison files: rows at budgets and seeds, and mistakes at their place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from mctk.comparison.file import load_comparison
from mctk.comparison.result import Budget
from mctk.errors import RecipeError, UserError
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

FILE = """\
model: some/model
calibration: {text: texts/*.jsonl, sequences: 8, length: 64}
budgets: {remove: [0.2, 0.4], of: experts}
evaluate:
  perplexity:
    - {text: test/*.jsonl, name: held out}
rows:
  - name: svd
    steps: [{decompose: svd}]
  - recipe: other.yaml
    label: The other
  - name: rounded
    budgets: none
    steps: [{quantize: rtn, options: {bits: 4}}]
  - name: both
    budgets: {keep: [0.5], of: experts, unit: parameters}
    set: {steps.0.options.rank_multiple: 2}
    steps: [{decompose: svd}, {quantize: rtn}]
"""
OTHER = """\
model: another/model
budget: {remove: 0.3, of: model}
allocate: {method: by_loss}
calibration: {text: elsewhere.txt}
steps:
  - decompose: svd_llm
    options: {storage: pivoted}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=FILE, overrides=(), other=OTHER, **flags):
        (tmp_path / "other.yaml").write_text(other)
        file = tmp_path / "comparison.yaml"
        file.write_text(text)
        return load_comparison([file], overrides, load_plugins(), **flags)

    return load


def mistake(load, old, new, **kwargs):
    assert old in FILE
    with pytest.raises(RecipeError) as error:
        load(FILE.replace(old, new, 1), **kwargs)
    return re.sub(r"\S*/(?=(comparison|other)\.yaml)", "", str(error.value))


def test_rows_times_budgets_times_seeds(load):
    loaded = load(overrides=["seeds=[0, 5]"])
    found = [(r.name, r.budget.remove if r.budget else None, r.seed) for r in loaded.rows]
    assert found == [
        *[(name, share, seed) for name in ("svd", "other") for share in (0.2, 0.4)
          for seed in (0, 5)],
        ("rounded", None, 0), ("rounded", None, 5), ("both", 0.5, 0), ("both", 0.5, 5),
    ]  # fmt: skip
    assert loaded.budgets == [Budget(0.2, "experts"), Budget(0.4, "experts")]
    assert str(loaded.output) == "runs/comparison"


def test_a_row_is_a_recipe_of_its_own_steps_and_the_files_rest(load, tmp_path):
    loaded = load()
    svd, _, other, _, rounded, both = loaded.rows
    assert all(row.recipe.model == "some/model" for row in loaded.rows)
    assert all(row.recipe.calibration.sequences == 8 for row in loaded.rows)
    assert svd.recipe.budget.remove == 0.2 and svd.recipe.budget.of == "experts"
    assert svd.recipe.allocate.method.name == "uniform"
    assert other.label == "The other"
    assert other.recipe.allocate.method.name == "by_loss"
    assert other.recipe.steps[0].options.storage == "pivoted"
    assert other.recipe.budget.remove == 0.2  # its own is not asked
    assert rounded.recipe.budget is None and rounded.recipe.allocate is None
    assert both.recipe.steps[0].options.rank_multiple == 2
    assert both.recipe.budget.kept == 0.5
    assert not svd.settled and both.settled
    assert svd.recipe.calibration._root == tmp_path
    # The row's recipe can be run as it stands.
    again = yaml.safe_load(both.recipe.yaml())
    assert again["budget"] == {"remove": 0.5, "of": "experts", "unit": "parameters"}
    assert again["steps"][0] == {"decompose": "svd", "options": {"rank_multiple": 2}}


def test_a_row_whose_steps_say_their_sizes_stands_without_a_budget(load):
    text = FILE.replace("    budgets: none\n", "").replace(
        "[{decompose: svd}]", "[{decompose: svd, size: {rank: 8}}]", 1
    )
    loaded = load(text)
    budgets = {name: [row.budget for row in loaded.rows if row.name == name] for name in
               ("svd", "rounded", "other")}  # fmt: skip
    assert budgets["svd"] == budgets["rounded"] == [None]
    assert len(budgets["other"]) == 2


def test_the_same_row_in_bytes(load):
    loaded = load()
    row = loaded.in_bytes(loaded.rows[0])
    assert row.budget == Budget(0.2, "experts", "bytes")
    assert row.recipe.budget.unit == "bytes"


def test_without_budgets_recipes_keep_their_own(load):
    text = FILE.replace("budgets: {remove: [0.2, 0.4], of: experts}\n", "")
    text = text.replace("    steps: [{decompose: svd}]", "    steps: [{decompose: svd, size: {keep: 0.5}}]", 1)  # fmt: skip  # noqa: E501
    names = [(row.name, row.budget and row.budget.remove) for row in load(text).rows]
    assert names == [("svd", None), ("other", 0.3), ("rounded", None), ("both", 0.5)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budgets: {remove", "budget: {remove",
         "comparison.yaml:3: key budget: unknown key (did you mean 'budgets'?)"),
        ("remove: [0.2, 0.4]", "remove: [20, 40]",
         "comparison.yaml:3: key budgets.remove.0: 20.0 is no share; write it as 0.2"),
        ("remove: [0.2, 0.4]", "remove: [0.2, 0.2]",
         "comparison.yaml:3: key budgets: the same share is given twice"),
        ("remove: [0.2, 0.4]", "of: model",
         "comparison.yaml:3: "),
        ("  - name: svd\n", "  - nam: svd\n",
         "comparison.yaml:8: key rows.0.nam: unknown key (did you mean 'name'?)"),
        ("{decompose: svd}]\n  - recipe", "{decompose: svdd}]\n  - recipe",
         "comparison.yaml:9: key rows.0.steps.0.decompose: no method 'svdd' for stage decompose"),
        ("{bits: 4}", "{bit: 4}",
         "comparison.yaml:14: key rows.2.steps.0.options.bit: unknown option of quantize/rtn "
         "(did you mean 'bits'?)"),
        ("recipe: other.yaml", "recipe: others.yaml",
         "comparison.yaml:10: key rows.1.recipe: there is no file others.yaml"),
        ("    budgets: none\n", "    budgets: none\n    unit: bytes\n",
         "comparison.yaml:12: key rows.2: unit has no effect without budgets"),
        ("name: both", "name: svd",
         "comparison.yaml:15: key rows.3.name: two rows are called 'svd'"),
        ("name: both", "name: svd/4bit",
         "comparison.yaml:15: key rows.3.name: 'svd/4bit' names a directory"),
        ("    label: The other", "    steps: []",
         "comparison.yaml:10: key rows.1: give exactly one of recipe and steps"),
        ("steps.0.options.rank_multiple: 2", "steps.0.options.rank_multiples: 2",
         "rows.3.set.steps.0.options.rank_multiples: key steps.0.options.rank_multiples: unknown"),
        ("steps.0.options.rank_multiple: 2", "model: another",
         "comparison.yaml:17: key rows.3.set.model: a row may change its steps, allocate and"),
        ("text: texts/*.jsonl", "txt: texts/*.jsonl",
         "comparison.yaml:2: key calibration.txt: unknown key (did you mean 'text'?)"),
        ("sequences: 8", 'sequences: "8"',
         'comparison.yaml:2: key calibration.sequences: should be a valid integer, got "8"'),
    ],
)  # fmt: skip
def test_mistakes_are_placed(load, old, new, message):
    assert message in mistake(load, old, new)


def test_a_mistake_in_a_named_recipe_is_placed_there(load):
    wrong = OTHER.replace("storage: pivoted", "storages: pivoted")
    said = mistake(load, "label: The other", "label: other", other=wrong)
    assert said.startswith("other.yaml:7: key steps.0.options.storages: unknown option")


def test_the_command_line_changes_the_file(load):
    loaded = load(remove=[0.3], model="mine", output="here", device="cpu")
    assert [row.budget.remove for row in loaded.rows if row.budget] == [0.3, 0.3, 0.5]
    assert loaded.rows[0].recipe.budget.of == "experts"  # the file's
    assert {row.recipe.model for row in loaded.rows} == {"mine"}
    assert str(loaded.output) == "here"
    with pytest.raises(RecipeError, match=r"--remove: key budgets.remove.0: 3.0 is no share"):
        load(remove=[3.0])
    loaded = load(overrides=["budgets.keep=[0.9]"])
    assert loaded.rows[0].budget.remove == 0.1 and loaded.rows[0].recipe.budget.remove == 0.1


def recipe(path: Path, **changes):
    data = {
        "model": "some/model",
        "calibration": {"text": "t.txt", "sequences": 4, "length": 32},
        "budget": {"remove": 0.5, "of": "experts"},
        "steps": [{"decompose": "svd"}],
        "evaluate": {"perplexity": [{"text": "t.txt"}]},
        **changes,
    }
    path.write_text(yaml.safe_dump(data))
    return path


def test_recipes_of_the_command_line_become_rows(tmp_path):
    a = recipe(tmp_path / "a.yaml")
    b = recipe(tmp_path / "b.yaml", steps=[{"decompose": "svd_llm"}], budget={"remove": 0.1})
    loaded = load_comparison([a, b], registry=load_plugins())
    assert [(r.name, r.budget.remove, r.budget.of) for r in loaded.rows] == [
        ("a", 0.5, "experts"),
        ("b", 0.1, "model"),
    ]
    assert str(loaded.output) == "runs/a-b"
    assert loaded.settings.evaluate.perplexity[0].name == "t"
    with pytest.raises(RecipeError, match="budget: the recipes' budgets are of different"):
        load_comparison([a, b], registry=load_plugins(), remove=[0.2, 0.4])
    recipe(tmp_path / "b.yaml", steps=[{"decompose": "svd_llm"}])
    loaded = load_comparison([a, b], registry=load_plugins(), remove=[0.2, 0.4])
    assert [(r.name, r.budget.remove, r.budget.of) for r in loaded.rows] == [
        (name, share, "experts") for name in ("a", "b") for share in (0.2, 0.4)
    ]


def test_recipes_must_agree(tmp_path):
    a, b = recipe(tmp_path / "a.yaml"), recipe(tmp_path / "b.yaml", model="other/model")
    with pytest.raises(RecipeError, match=r"b.yaml:\d+: key model: differs from .*a.yaml"):
        load_comparison([a, b], registry=load_plugins())
    loaded = load_comparison([a, b], registry=load_plugins(), model="third")
    assert {row.recipe.model for row in loaded.rows} == {"third"}
    recipe(b, calibration={"text": "t.txt", "sequences": 5, "length": 32})
    with pytest.raises(RecipeError, match="key calibration: differs"):
        load_comparison([a, b], registry=load_plugins())


def test_a_comparison_is_given_alone(tmp_path, load):
    load()
    with pytest.raises(UserError, match="is given alone"):
        load_comparison(
            [recipe(tmp_path / "a.yaml"), tmp_path / "comparison.yaml"], registry=load_plugins()
        )


def test_a_comparison_is_no_recipe(load, tmp_path):
    load()
    with pytest.raises(RecipeError, match=r"key rows: is a key of comparisons; `mctk compare`"):
        load_recipe(tmp_path / "comparison.yaml", registry=load_plugins())
