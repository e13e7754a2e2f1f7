import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_plugin import Drop, Truncate, fake_registry
from hypothesis import given
from hypothesis import strategies as st
from mctk.errors import RecipeError, UserError
from mctk.recipe import Layers, load_recipe

RECIPE = """\
model: some/model
seed: 3
calibration:
  text: calibration/*.jsonl
  sequences: 8
  length: 64
budget: {remove: 0.4, of: experts}
allocate:
  method: uniform
steps:
  - decompose: truncate
    layers: 0-3,5
    options:
      balance: true
  - prune: drop
    targets: [experts.*, mlp.up]
evaluate:
  perplexity:
    - text: test/*.jsonl
      name: held out
    - {dataset: wikitext2, length: 128, windows: 4}
  tasks: [arc_easy]
  limit: 10
"""


@pytest.fixture
def load(tmp_path):
    def load(text=RECIPE, *overrides, **flags):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return load_recipe(file, overrides, fake_registry(), **flags)

    return load


def mistake(load, old, new):
    """Loads the recipe with one thing changed; returns the error without its directory."""
    assert old in RECIPE
    with pytest.raises(RecipeError) as error:
        load(RECIPE.replace(old, new, 1))
    return str(error.value).partition("/recipe.yaml:")[2]


def test_a_recipe_is_read(load):
    recipe = load()
    decompose, prune = recipe.steps
    assert isinstance(decompose.method, Truncate) and isinstance(prune.method, Drop)
    assert decompose.options.balance is True and decompose.options.multiple == 8
    assert decompose.auto and decompose.stage == "decompose"
    assert prune.size is None and not prune.auto
    assert decompose.targets == ["experts.*"]
    assert [layer for layer in range(8) if layer in decompose.layers] == [0, 1, 2, 3, 5]
    assert prune.selects(7, "mlp.up") and not prune.selects(7, "mlp.down")
    assert not decompose.selects(4, "experts.up") and decompose.selects(5, "experts.up")
    assert recipe.budget.kept == pytest.approx(0.6)
    assert recipe.allocate.method.name == "uniform"
    assert recipe.output == Path("runs/recipe")
    assert [text.name for text in recipe.evaluate.perplexity] == ["held out", "wikitext2"]
    assert recipe.propagate == "compressed"  # drop declares it
    assert load(RECIPE, "calibration.propagate=original").propagate == "original"


def test_a_mapping_is_a_recipe_as_well():
    content = {"model": "m", "steps": [{"decompose": "truncate", "size": {"rank": 8}}]}
    recipe = load_recipe(content, registry=fake_registry())
    assert recipe.steps[0].size.rank == 8
    assert recipe.file is None
    content["steps"][0]["size"]["rank"] = 0
    with pytest.raises(RecipeError, match=r"^key steps\.0\.size\.rank: should be greater"):
        load_recipe(content, registry=fake_registry())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # keys
        ("seed: 3", "sead: 3", "2: key sead: unknown key (did you mean 'seed'?)"),
        ("sequences: 8", "sequence: 8", "5: key calibration.sequence: unknown key (did you mean"),
        ("remove:", "removve:", "7: key budget.removve: unknown key (did you mean 'remove'?)"),
        ("layers:", "layer:", "12: key steps.0.layer: unknown key (did you mean 'layers'?)"),
        ("balance:", "balnce:", "14: key steps.0.options.balnce: unknown option of decompose/trun"),
        ("method: unif", "methods: unif", "9: key allocate.methods: unknown key (did you mean 'm"),
        ("windows:", "window:", "21: key evaluate.perplexity.1.window: unknown key (did you mean"),
        ("seed: 3", "model: other", "2: key model: given twice, first in line 1"),
        ("model: some/model\n", "", "1: key model: is missing"),
        # methods
        ("truncate", "trunkate", "11: key steps.0.decompose: no method 'trunkate' for stage"),
        ("truncate", "[truncate]", "11: key steps.0.decompose: should be a method's name, got ["),
        ("method: uniform", "method: unifrom", "9: key allocate.method: no method 'unifrom'"),
        ("decompose: truncate", "name: truncate", "11: key steps.0.name: unknown key"),
        (
            "decompose: truncate",
            "targets: a",
            "11: key steps.0: the step names no method; give one",
        ),
        (
            "prune: drop",
            "prune: drop\n    merge: x",
            "16: key steps.1.merge: the step has two meth",
        ),
        ("prune: drop", "allocate: uniform", "15: key steps.1.allocate: allocate is no step"),
        (
            "- prune: drop\n    targets: [experts.*, mlp.up]",
            "- drop",
            "15: key steps.1: a step is a",
        ),
        # types and ranges
        ("balance: true", "balance: 1", "14: key steps.0.options.balance: should be a valid bool"),
        (
            "balance: true",
            "multiple: 0",
            "14: key steps.0.options.multiple: should be greater than",
        ),
        (
            "balance: true",
            "storage: pivot",
            "14: key steps.0.options.storage: should be 'plain' or",
        ),
        (
            "options:\n      balance: true",
            "options:",
            "13: key steps.0.options: should be a mapping",
        ),
        ("seed: 3", "seed: '3'", '2: key seed: should be a valid integer, got "3"'),
        ("seed: 3", "gate: yes", '2: key gate: should be a valid boolean, got "yes"'),
        ("seed: 3", "device: gpu", "2: key device: 'gpu' is no device; write auto"),
        (
            "seed: 3",
            "dtype: bf16",
            "2: key dtype: should be 'auto', 'float32', 'bfloat16' or 'floa",
        ),
        (
            "length: 64",
            "length: 1",
            "6: key calibration.length: should be greater than or equal to 2",
        ),
        ("calibration:\n", "calibration: 3\nunused:\n", "4: key unused: unknown key"),
        ("{remove: 0.4,", "{remove: 1.4,", "7: key budget.remove: should be less than 1, got 1.4"),
        ("{remove: 0.4,", "{remove: .nan,", "7: key budget.remove: should be"),
        ("{remove: 0.4,", "{", "7: key budget: give exactly one of remove and keep"),
        ("{remove: 0.4,", "{remove: 0.4, keep: 0.6,", "7: key budget: give exactly one of remove"),
        (
            "of: experts",
            "of: expert",
            "7: key budget.of: should be 'model', 'experts' or 'targets'",
        ),
        ("text: cal", "dataset: c4\n  text: cal", "3: key calibration: give exactly one of text,"),
        ("text: cal", "split: x\n  text: cal", "3: key calibration: split has no effect without"),
        (
            "dataset: wikitext2",
            "dataset: wikitext",
            "21: key evaluate.perplexity.1.dataset: no dataset is called 'wikitext' (did",
        ),
        ("name: held out", "name: wikitext2", "17: key evaluate: two perplexity texts are named"),
        ("  tasks: [arc_easy]\n", "", "17: key evaluate: limit has no effect without tasks"),
        ("[experts.*, mlp.up]", "'experts *'", "16: key steps.1.targets: 'experts *' is no glob"),
        ("[experts.*, mlp.up]", "[]", "16: key steps.1.targets: should have at least 1 item"),
        # layers
        ("0-3,5", "-1", "12: key steps.0.layers: -1 is no layer range; write all, 3, [0, 1] or"),
        ("0-3,5", "3-0", "12: key steps.0.layers: range 3-0 runs backwards; write 0-3"),
        ("0-3,5", "first", "12: key steps.0.layers: 'first' is no layer range"),
        ("0-3,5", "[]", "12: key steps.0.layers: names no layer"),
        ("0-3,5", "[true]", "12: key steps.0.layers: True is no layer range"),
        # sizes and the budget
        (
            "layers: 0-3,5",
            "size: auto\n    layers: all\n    size: auto",
            "14: key steps.0.size: given",
        ),
        (
            "layers: 0-3,5",
            "size: 0.5",
            "12: key steps.0.size: write auto, {keep: 0.6} or {rank: 128}",
        ),
        ("layers: 0-3,5", "size: {keep: 1.5}", "12: key steps.0.size.keep: should be less than or"),
        (
            "layers: 0-3,5",
            "size: {kep: 0.5}",
            "12: key steps.0.size.kep: unknown key (did you mean",
        ),
        ("layers: 0-3,5", "size: {keep: 0.5}", "7: key budget: has no effect: no step takes its"),
        ("targets: [experts.*, mlp.up]", "size: auto", "16: key steps.1.size: prune/drop takes no"),
        (
            "budget: {remove: 0.4, of: experts}\n",
            "",
            "10: key steps.0: decompose/truncate needs a si",
        ),
        # the file as such
        (
            "model: some/model",
            "model: [",
            "3: not YAML: expected ',' or ']', but got ':' while parsing a flow sequence from",
        ),
        ("model: some/model", "model: !!int x", "1: invalid literal"),
        ("model: some/model", "model: !secret x", "1: tag !secret is not supported"),
        ("model: some/model", "? [a]\n: b", "1: a key must be text"),
        ("calibration:", "calibration: &c\n  again: *c", "3: an anchor contains itself"),
        ("model: some/model", "model: ./nowhere", "1: key model: there is no directory ./nowhere"),
    ],
)
def test_a_mistake_is_named_with_its_line(load, old, new, message):
    assert mistake(load, old, new).startswith(message)


def test_an_allocator_by_error_refuses_scores(load):
    text = RECIPE.replace("truncate", "score").replace("uniform", "greedy")
    with pytest.raises(RecipeError, match=r":9: key allocate\.method: 'greedy' compares squared"):
        load(text)
    assert load(RECIPE.replace("uniform", "greedy"))


def test_sizes_without_a_budget(load):
    text = RECIPE.replace("budget: {remove: 0.4, of: experts}\n", "")
    text = text.replace("allocate:\n  method: uniform\n", "")
    sized = text.replace("layers: 0-3,5", "size: {keep: 0.5}")
    recipe = load(sized)
    assert recipe.steps[0].size.keep == 0.5 and not recipe.steps[0].auto
    assert recipe.allocate is None
    with pytest.raises(RecipeError, match=r":9: key steps\.0\.size: auto needs a budget"):
        load(text.replace("layers: 0-3,5", "size: auto"))
    with pytest.raises(RecipeError, match="key allocate: has no effect without a budget"):
        load(sized + "allocate: {method: uniform}\n")


def test_a_budget_is_shared_out_uniformly_by_default(load):
    text = RECIPE.replace("allocate:\n  method: uniform\n", "")
    assert load(text).allocate.method.name == "uniform"


@pytest.mark.parametrize(
    ("text", "what"), [("", "is empty"), ("- a", "is a mapping"), ("a", "is a m")]
)
def test_a_file_that_is_no_recipe(load, text, what):
    with pytest.raises(RecipeError, match=what):
        load(text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml", registry=fake_registry())
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match=r"latin\.yaml: is not UTF-8"):
        load_recipe(tmp_path / "latin.yaml", registry=fake_registry())


def test_numbers_are_read_as_people_mean_them(load):
    recipe = load(RECIPE.replace("0.4", "4e-1"), "seed=0", "revision=1e3x")
    assert recipe.budget.remove == 0.4
    assert recipe.revision == "1e3x"
    assert load(RECIPE, "revision=no").revision == "no"
    assert load(RECIPE, "revision=2024-01-01").revision == "2024-01-01"
    assert load(RECIPE, "revision=null").revision is None


def test_overrides(load):
    recipe = load(
        RECIPE,
        "budget.keep=0.7",
        "steps.0.options.multiple=4",
        "steps.0.layers=[1, 2]",
        "steps.1.prune=drop",
        "evaluate.perplexity.1.windows=2",
        "storage_dtype=float16",
        output="elsewhere",
        device=None,
        seed=5,
    )
    assert recipe.budget.keep == 0.7 and recipe.budget.remove is None
    assert recipe.steps[0].options.multiple == 4 and recipe.steps[0].options.balance
    assert str(recipe.steps[0].layers) == "1,2"
    assert recipe.evaluate.perplexity[1].windows == 2
    assert (recipe.output, recipe.seed, recipe.device) == (Path("elsewhere"), 5, "auto")
    assert load(RECIPE, "calibration.dataset=c4").calibration.text is None
    keyed = load(
        RECIPE.replace("    options:\n      balance: true\n", ""), "steps.0.options.balance=true"
    )
    assert keyed.steps[0].options.balance


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "budget.kep=0.7",
            "--set budget.kep=0.7: key budget.kep: unknown key (did you mean 'keep'?)",
        ),
        ("bugdet.keep=0.7", "key bugdet: unknown key (did you mean 'budget'?)"),
        ("steps.2.size=auto", "--set steps.2.size=auto: steps has entries 0 to 1 only"),
        ("steps.first.size=auto", "steps has entries 0 to 1 only"),
        (
            "steps.0.options.balnce=true",
            "key steps.0.options.balnce: unknown option of decompose/tr",
        ),
        (
            "steps.0.options.balance=3",
            "key steps.0.options.balance: should be a valid boolean, got 3",
        ),
        ("seed", "--set seed: write it as KEY=VALUE"),
        ("a..b=1", "--set a..b=1: write it as KEY=VALUE"),
        ("seed=[", "--set seed=[: the value is not YAML"),
        ("seed.x=1", "key seed: should be a valid integer"),
    ],
)
def test_a_wrong_override_names_itself(load, override, message):
    with pytest.raises(UserError) as error:
        load(RECIPE, override)
    assert message in str(error.value)
    assert str(error.value).startswith("--set")


def test_the_effective_recipe_can_be_read_again(load, tmp_path):
    recipe = load(RECIPE, "budget.keep=0.7", "revision='1e3'")
    (tmp_path / "again.yaml").write_text(recipe.yaml())
    again = load_recipe(tmp_path / "again.yaml", registry=fake_registry())
    assert again.canonical() == recipe.canonical()
    assert again.revision == "1e3"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/me/project/models/moe", "models/moe"),  # beside the recipe
        ("/home/me/secret/moe", "moe"),
        ("/home/me/secret/books/*.jsonl", "books/*.jsonl"),
        ("/home/me/secret/**/a.txt", "secret/**/a.txt"),
        ("~/secret/moe", "moe"),
        ("demo/model", "demo/model"),
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("/", "/"),
    ],
)
def test_published_paths_are_names(path, shown):
    from mctk.recipe.published import published, published_command

    root = Path("/home/me/project")
    assert published({"a": [path, 1, None]}, root) == {"a": [shown, 1, None]}
    if not path.startswith("/home/me/project"):
        line = f"mctk run a.yaml --model '{path}' --set 'model={path}'"
        assert shlex.split(published_command(line))[4:] == [shown, "--set", f"model={shown}"]
        inside = published_command(f"mctk run a.yaml --set 'calibration={{text: [{path}, b.txt]}}'")
        assert shlex.split(inside)[-1] == f"calibration={{text: [{shown}, b.txt]}}"


def test_the_fingerprint_is_of_what_decides_the_checkpoint(load):
    recipe = load()
    assert json.loads(json.dumps(recipe.canonical())) == recipe.canonical()
    same = load(
        RECIPE, "output=x", "device=cpu", "gate=false", "evaluate=null", "calibration.batch=2"
    )
    assert same.fingerprint() == recipe.fingerprint()
    spelt_out = load(RECIPE, "steps.0.size=auto", "steps.0.options.multiple=8", "dtype=auto")
    assert spelt_out.fingerprint() == recipe.fingerprint()
    changes = [
        "seed=4",
        "budget.remove=0.5",
        "budget.of=model",
        "steps.0.layers=all",
        "dtype=float32",
    ]
    changes += ["steps.0.options.multiple=4", "calibration.text=other", "model=other/model"]
    changes += ["calibration.propagate=original", "allocate.method=greedy"]
    prints = {load(RECIPE, change).fingerprint() for change in changes}
    assert len(prints | {recipe.fingerprint()}) == len(changes) + 1


def test_a_methods_version_is_part_of_the_fingerprint(load, monkeypatch):
    before = load().fingerprint()
    monkeypatch.setattr(Truncate, "version", 4)
    assert load().fingerprint() != before


def test_paths_are_found_beside_the_recipe_or_from_here(load, tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    text = RECIPE.replace("some/model", "model")
    assert load(text).model == "model"
    (tmp_path / "model").mkdir()
    assert load(text).model == str(tmp_path / "model")
    assert load(text).canonical()["model"] == "model"
    with pytest.raises(RecipeError, match="key revision: has no effect on a model directory"):
        load(text, "revision=main")
    (here / "calibration").mkdir()
    (here / "calibration" / "a.jsonl").write_text("")
    assert load().calibration.source.files() == [Path("calibration/a.jsonl")]
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "b.jsonl").write_text("")
    assert load().calibration.source.files() == [tmp_path / "calibration/b.jsonl"]


def test_a_mix_of_sources(load):
    text = RECIPE.replace("text: cal", "mix: [{text: a.txt}, {dataset: c4, weight: 3}]\n  #")
    first, second = load(text).calibration.source
    assert (first.text, second.dataset, second.weight) == (["a.txt"], "c4", 3)
    with pytest.raises(RecipeError, match=r":4: key calibration\.mix\.1\.wait: unknown key"):
        load(text.replace("weight", "wait"))


def test_layers_past_the_last_are_found_when_the_model_is_known(load):
    load().check_layers(6)
    with pytest.raises(
        RecipeError, match=r":12: key steps\.0\.layers: there is no layer 5; the last is 4"
    ):
        load().check_layers(5)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_layers_mean_the_same_however_written(layers):
    text = ",".join(map(str, sorted(layers)))
    for written in (text, sorted(layers), str(Layers.parse(text))):
        assert {layer for layer in range(50) if layer in Layers.parse(written)} == layers


def test_loading_a_recipe_imports_no_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    code = (
        "import sys\n"
        "from fake_plugin import fake_registry\n"
        "from mctk.recipe import load_recipe\n"
        f"load_recipe({str(tmp_path / 'recipe.yaml')!r}, registry=fake_registry())\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "[]", done.stderr
