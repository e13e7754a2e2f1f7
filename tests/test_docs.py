"""What the documentation says is what the code does."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
import yaml
from mctk import cli
from mctk.comparison.file import load_comparison
from mctk.comparison.schema import ComparisonFile
from mctk.decompose import matrices
from mctk.errors import CheckpointError
from mctk.hookspecs import STAGES, Method, Plugin
from mctk.recipe import Layers, Recipe, load_recipe
from mctk.recipe.load import model_in
from mctk.registry import Registry, load_plugins
from mctk.terms import Bank, BankShape, Bias, Dense
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FORMAT = (ROOT / "docs" / "format.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
PLUGIN = (ROOT / "docs" / "write_a_plugin.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


# docs/format.md


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    [text] = blocks(FORMAT, "json")
    return json.loads(text)


def specs(example: dict[str, Any]) -> Iterator[tuple[str, str | None, int, dict[str, Any]]]:
    """Module, part, index and spec of every term of the example."""
    for path, module in example["quantization_config"]["modules"].items():
        terms = module["terms"]
        parts = terms.items() if module["type"] == "experts" else [(None, terms)]
        for part, listed in parts:
            for index, spec in enumerate(listed):
                yield path, part, index, spec


def tensors(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, entry in spec["tensors"].items():
        dtype = getattr(torch, entry["dtype"])
        if dtype.is_floating_point or dtype == torch.uint8:
            found[name] = torch.zeros(entry["shape"], dtype=dtype)
        else:  # indices that do not repeat
            found[name] = torch.arange(entry["shape"][-1], dtype=dtype).expand(entry["shape"])
    return found


def test_the_formats_example_loads(example):
    from mctk.runtime.quantizer import MctkConfig
    from mctk.terms import Term

    MctkConfig(**example["quantization_config"])
    for _, _, _, spec in specs(example):
        assert Term.from_spec(spec, tensors(spec)).spec() == spec


def test_the_formats_page_has_every_kind_key_and_tensor_name(example):
    from mctk.runtime.names import is_ours
    from mctk.runtime.owner import tensor_name
    from mctk.terms import kinds

    ours = {kind for kind, provider in kinds().items() if provider == "mctk"}
    assert {spec["kind"] for *_, spec in specs(example)} == ours
    assert is_ours(example["experts_implementation"])
    for *_, spec in specs(example):
        for key in [*spec, *spec["tensors"]]:
            # The page says of packed tensors in general what `weight`'s are.
            name, _, part = key.rpartition("_")
            shown = f"weight_{part}" if name in spec.get("packing", {}) else key
            assert f"`{shown}" in FORMAT, key
    for key in example["quantization_config"]:
        assert f"`quantization_config.{key}`" in FORMAT
    # The list of tensors below the example: a name after "..." goes on from the last full path.
    listed = FORMAT.partition("Its tensors:")[2].partition("##")[0]
    names, stem = set(), ""
    for name in re.findall(r"`([^`]+)`", listed):
        if not name.startswith("..."):
            stem = name.partition("terms")[0]
            names.add(name)
        else:
            names.add(f"{stem}terms{name.removeprefix('...')}")
    assert names == {
        f"{path}.{tensor_name(part, index, key)}"
        for path, part, index, spec in specs(example)
        for key in spec["tensors"]
    }


def test_the_format_builds_a_model(example):
    """The example's modules go into a model of the example's shapes."""
    from accelerate import init_empty_weights
    from mctk.runtime import swap_from_config
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=4, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=64,
    )  # fmt: skip
    with init_empty_weights():
        model = MixtralForCausalLM(config)
    swap_from_config(model, example["quantization_config"])
    state = model.state_dict()
    assert "model.layers.0.mlp.experts.terms_gate_1_U" in state
    assert "model.layers.0.self_attn.q_proj.terms_0_V_zeros" in state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dens"}, "unknown term kind 'dens'"),
        ({"slots": [0, 0, 0, 1]}, "slot 1 is not one of the 1 stored"),
        ({"slots": [0, 0]}, "has 2 entries, the bank has 4 members"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"out": 97}, "weight: has shape"),
        ({"provider": "mobe", "kind": "mobe"}, "comes from the plugin 'mobe'"),
    ],
)
def test_what_the_format_refuses(example, change, message):
    from mctk.terms import Term

    spec = next(spec for *_, spec in specs(example))
    with pytest.raises(CheckpointError, match=message):
        Term.from_spec({**spec, **change}, tensors(spec))


@pytest.mark.parametrize("key", ["pivots", "cols"])
def test_indices_neither_repeat_nor_leave_the_matrix(example, key):
    from mctk.terms import Term

    spec = next(spec for *_, spec in specs(example) if key in spec["tensors"])
    for value in (0, 1000, -1):
        damaged = {name: tensor.clone() for name, tensor in tensors(spec).items()}
        damaged[key][..., 1] = value
        with pytest.raises(CheckpointError, match=key):
            Term.from_spec(spec, damaged)


# docs/write_a_plugin.md and hookspecs.py


def test_the_plugin_pages_hooks_have_the_arguments_of_the_specification():
    """A hook of the page may leave its types out, but none of its arguments."""
    code = "\n".join(re.findall(r"^```python[^\n]*\n(.*?)^```$", PLUGIN, re.S | re.M))
    definition = r"^ {4}def (\w+)\(\s*self,?\s*(.*?)\s*\)(?: -> [^\n]+)?:\n"
    found = re.findall(definition, code, re.S | re.M)
    assert {name for name, _ in found} >= {"needs", "sizes", "layout", "prune", "merge"}
    for name, arguments in found:
        given = [part.split(":")[0].strip() for part in arguments.split(",") if part.strip()]
        wanted = list(inspect.signature(getattr(Method, name)).parameters)[1:]
        assert given == wanted, name


def test_the_plugin_page_names_every_hook():
    table = PLUGIN.partition("| hook | gives |")[2].partition("\n\n")[0]
    rows = set(re.findall(r"^\| `(\w+\([^`]*\))` \|", table, re.M))
    for name, member in vars(Method).items():
        if hasattr(member, "mctk_spec"):
            signature = ", ".join(list(inspect.signature(member).parameters)[1:])
            assert f"{name}({signature})" in rows, f"the table of hooks lacks {name}({signature})"
            rows.remove(f"{name}({signature})")
    assert not rows, "no hooks of a method"
    for name, member in vars(Plugin).items():
        if hasattr(member, "mctk_spec"):
            signature = ", ".join(list(inspect.signature(member).parameters)[1:])
            assert f"`{name}({signature})`" in PLUGIN


def test_every_stage_is_explained_and_has_a_method_in_the_readme():
    words = ARCHITECTURE.partition("## Words")[2]
    [listed] = re.findall(r"^\| stage \| what a method does: (.*?) \|$", words, re.M)
    assert listed.split(", ") == list(STAGES)
    for stage in {method.stage for method in load_plugins().methods()}:
        assert f"`{stage}`:" in README, f"README's table of methods has none of stage {stage}"


def test_every_method_is_in_the_readme():
    table = README.partition("## Methods")[2].partition("\n## ")[0]
    missing = [
        f"{method.stage}/{method.name}"
        for method in load_plugins().methods()
        if not re.search(rf"(?<![\w/-]){method.name}(?![\w-])", table)
    ]
    assert not missing


def test_every_class_attribute_of_a_method_is_on_the_plugin_page():
    """What a method can declare of itself; `origin` is set for it."""
    attributes = [name for name in Method.__annotations__ if name != "origin"]
    table = PLUGIN.partition("| attribute |")[2].partition("\n\n")[0]
    assert not [name for name in attributes if f"`{name}`" not in table]


def test_every_need_is_on_the_plugin_page():
    from mctk import statistics

    kinds = [
        name
        for name in statistics.__all__
        if isinstance(getattr(statistics, name), type)
        and issubclass(getattr(statistics, name), statistics.Need)
    ]
    table = PLUGIN.partition("| need | value |")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| (.*?) \|", table, re.M)
    listed = set(re.findall(r"`(\w+)\(", " ".join(cells)))
    listed |= {"Fisher", "ChannelFisher"}  # in words below
    ours = {"Need", "LayerPassed"}  # the base, and the engine's own
    assert listed == set(kinds) - ours


def test_the_plugin_pages_merge_runs():
    """It is exact, its layout is what it returns, and a decompose step goes on from it."""
    [code] = [block for block in blocks(PLUGIN, "python") if "class PairMean" in block]
    names: dict[str, Any] = {}
    exec(
        "from __future__ import annotations\n"
        "from mctk import decompose\nfrom mctk.hookspecs import Method, hookimpl\n"
        f"{code}\n@hookimpl\ndef methods():\n    return [PairMean()]\n",
        names,
    )
    registry = Registry({"pairs": SimpleNamespace(methods=names["methods"])})
    assert [info.error for info in registry.plugins()] == [None]
    method = registry.method("merge", "pair_mean")

    def layer(device: str) -> dict[str, Bank]:
        generator = torch.Generator().manual_seed(0)
        shape = BankShape(5, 6, 4)
        dense = Dense(shape, range(5), torch.randn(5, 6, 4, generator=generator).to(device))
        bias = Bias(shape, range(5), torch.randn(5, 6, generator=generator).to(device))
        return {"experts.up": Bank("experts.up", 0, shape, [dense, bias])}

    real, options = layer("cpu")["experts.up"], method.Options()
    merged = method.merge(layer("cpu"), None, None, options)["experts.up"]
    planned = method.layout(layer("meta"), None, options)["experts.up"]
    assert [term.spec() for term in planned] == [term.spec() for term in merged]
    assert len(merged[0].weight) == 3 and merged[0].slots == (0, 0, 1, 1, 2)
    after = Bank("experts.up", 0, real.shape, merged)
    assert matrices(after) is merged[1]
    for e in range(5):
        for ours, theirs in zip(after.materialise(e), real.materialise(e), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    code = r"^```.*?^```$|`[^`]+`|^ {4}\S.*?$"
    text = re.sub(code, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


# Commands


def commands() -> list[tuple[str, str]]:
    """Every `mctk ...` in code blocks and in code spans, with its page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line for block in blocks(text, r"(?:sh|bash|console)") for line in block.splitlines()
        ]
        spans = re.findall(
            r"`((?:[A-Z_]+=\S+ )?mctk [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
        )
        for line in [*lines, *spans]:
            line = re.sub(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*", "", line.strip())
            if line.startswith("mctk "):
                found.append((page.name, " ".join(line.split())))
    return sorted(set(found))


def test_commands_are_found():
    assert len(commands()) >= 8


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_in_the_documentation_parses(page, line):
    words = [word for word in shlex.split(line, comments=True)[1:] if word not in ("...", "…")]
    words = words[: words.index(">")] if ">" in words else words
    if words[0].startswith("-"):
        assert words in (["--help"], ["--version"])
        return
    words = [word for word in words if word != "--debug"]
    assert words[0] in cli.COMMANDS, f"{page}: {line}"
    module = f"mctk.cli.{words[0].replace('-', '_')}"
    command: Any = __import__(module, fromlist=["command"]).command
    at, rest = 1, words[1:]
    while isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest, at = command.commands[rest[0]], rest[1:], at + 1
    if len(rest) == 0 and any(p.required for p in command.params):
        return  # a command that is only mentioned
    with click.Context(command, ignore_unknown_options=False) as context:
        command.parse_args(context, list(rest))


# docs/recipes.md


def shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "–"
    if isinstance(default, Layers):
        default = str(default)
    return f"`{json.dumps(default)}`".replace('"', "") if default != "" else "–"


def rows(model: type[BaseModel] = Recipe, path: str = "") -> Iterator[tuple[str, str]]:
    """For every key of the schema its path and the row that docs/recipes.md must have."""
    for name, field in model.model_fields.items():
        here = f"{path}{name}"
        if here in ("steps[].method", "steps[].stage"):
            for stage in STAGES:
                if stage != "allocate":
                    key = f"steps[].{stage}"
                    yield key, f"| `{key}` |"
            continue
        default = {  # filled in by the loader
            "output": "`runs/<recipe>`",
            "allocate": "`{method: uniform}`",
            "allocate.method": "`uniform`",
            "allocate.options": "`{}`",
            "steps[].options": "`{}`",
        }.get(here) or shown(field.get_default(call_default_factory=True))
        yield here, f"| `{here}` | {default} | {field.description}"
        below = model_in(field.annotation)
        if below is not None and name not in ("method", "options"):
            many = "[]" if "list[" in str(field.annotation) else ""
            yield from rows(below, f"{here}{many}.")


@pytest.mark.parametrize(("key", "row"), list(rows()))
def test_every_key_of_a_recipe_is_documented(key, row):
    assert row in RECIPES, f"docs/recipes.md should have the row\n{row} |"


def test_no_key_is_documented_that_is_none():
    keys = {key for key, _ in rows()}
    tables = RECIPES.partition("## All keys")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([^`]+)` \|", tables, flags=re.MULTILINE))
    assert documented == keys


def test_every_key_of_a_comparison_is_documented():
    table = RECIPES.partition("## Comparison files")[2].partition("\n## ")[0]
    shared = set(re.findall(r"`(\w+)`", table.partition("| as in a recipe |")[0].splitlines()[-1]))
    shared |= {"calibration", "evaluate"}
    own = [(key, row) for key, row in rows(ComparisonFile) if key.split(".")[0] not in shared]
    for key, row in own:
        if key.startswith("rows[].budgets."):
            continue  # the same as the comparison's
        row = row.replace("`runs/<recipe>`", "`runs/<file>`").replace("`{method: uniform}`", "–")
        assert row in table, f"docs/recipes.md should have the row\n{row} |"
    assert shared - {"calibration", "evaluate"} <= set(ComparisonFile.model_fields)
    documented = set(re.findall(r"^\| `([\w.\[\]]+)` \|", table, flags=re.MULTILINE))
    assert documented <= {key for key, _ in rows(ComparisonFile)}


def test_the_comparison_in_the_documentation_loads():
    [text] = re.findall(r"^```yaml comparison\n(.*?)^```$", RECIPES, flags=re.S | re.M)
    loaded = load_comparison(yaml.safe_load(text), registry=load_plugins())
    assert len(loaded.rows) == 3 + 3 + 1 + 2


@pytest.mark.parametrize("text", blocks(RECIPES, "yaml"))
def test_recipes_in_the_documentation_load(text):
    data = yaml.safe_load(text)
    whole = {"model": "some/model", "steps": [{"decompose": "svd", "size": {"keep": 0.5}}]}
    if "steps" not in data and "budget" in data:
        whole["steps"] = [{"decompose": "svd"}]
    load_recipe({**whole, **data}, registry=load_plugins())
