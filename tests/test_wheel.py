"""The wheel, installed as a user's: what it holds, and that its recipes plan outside of the clone.

The models are header-only, with layers of the published sizes, a few of each.
"""

from __future__ import annotations

import json
import os
import struct
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.fresh_venv import ROOT, fresh, wheel  # noqa: F401 (fixtures)
from tests.planning import test_true_deepseek_v3 as deepseek_v3
from tests.planning import true_configs as configs
from tests.planning.true_headers import write_model

MODELS = {
    "mistralai/Mixtral-8x7B-v0.1": configs.MIXTRAL,
    "microsoft/Phi-3.5-MoE-instruct": configs.PHI35_MOE,
    "Qwen/Qwen2-57B-A14B": configs.QWEN2_57B_A14B,
    "Qwen/Qwen3-30B-A3B": configs.QWEN3_30B_A3B,
    "deepseek-ai/deepseek-moe-16b-base": configs.DEEPSEEK_MOE_16B,
    "allenai/OLMoE-1B-7B-0924": configs.OLMOE,
    "openai/gpt-oss-20b": configs.GPT_OSS_20B,
}
LAYERS = 4
# Runs commands, each in its directory, in one process: torch is imported once.
MANY = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from mctk.cli import main
for directory, line in json.load(open(sys.argv[1])):
    os.chdir(directory)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(line)
        except SystemExit as done:
            code = done.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def listed(fresh):  # noqa: F811
    """What `mctk recipes` says, by name."""
    rows = json.loads(fresh.run("mctk", "recipes", "--json").stdout)
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """Gives a directory with a hub model's headers."""
    root = tmp_path_factory.mktemp("headers")

    def write(model: str) -> Path:
        path = root / model.replace("/", "--")
        if path.exists():
            return path
        if model == "deepseek-ai/DeepSeek-V3":
            return write_deepseek_v3(path)
        assert model in MODELS, f"a recipe names {model}: put its headers into true_headers.py"
        return write_model(path, shortened(MODELS[model]))

    return write


def shortened(config: dict) -> dict:
    """The configuration with a few layers: a plan of all takes the longer, and says the same."""
    layers = config["num_hidden_layers"]
    listed = {k: v[:LAYERS] for k, v in config.items() if isinstance(v, list) and len(v) == layers}
    return {**config, **listed, "num_hidden_layers": LAYERS}


def write_deepseek_v3(path: Path) -> Path:
    """Five of its layers, with blocks in FP8 and their scales: headers, and nothing after them."""
    deepseek_v3.source(path, 5)
    header, end = {}, 0
    for name, info in deepseek_v3.headers(5).items():
        offsets = [end, end + info.nbytes]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        end += info.nbytes
    text = json.dumps(header).encode()
    file = path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
    return path


def test_what_the_wheel_holds(wheel):  # noqa: F811
    names = zipfile.ZipFile(wheel).namelist()
    assert "mctk/py.typed" in names
    templates = {path.name for path in (ROOT / "toolkit/mctk/templates/plugin").iterdir()}
    assert templates and {f"mctk/templates/plugin/{name}" for name in templates} <= set(names)
    modules = [*(ROOT / "toolkit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    wanted = {str(path.relative_to(ROOT)).partition("/")[2] for path in modules}
    assert {name for name in names if name.endswith(".py")} == wanted
    assert not [name for name in names if "demo" in name or name.endswith(".safetensors")]


def test_every_recipe_of_a_hub_model_comes_along(listed):
    texts = {path.stem: path.read_text() for path in (ROOT / "recipes").glob("*.yaml")}
    of_the_clone = {name for name, text in texts.items() if "demo/" in text}
    assert {"d2moe_demo", "compare_demo", "compare_smollm2"} <= of_the_clone
    assert set(listed) == set(texts) - of_the_clone
    assert listed["compare_mixtral"]["command"] == "compare"
    assert all(row["about"] for row in listed.values())


def test_the_version_is_pyprojects(fresh):  # noqa: F811
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fresh.run("mctk", "--version").stdout == f"mctk, version {version}\n"
    printed = fresh.run(
        "python", "-c", "import mctk; print(mctk.__version__, mctk.__file__)"
    ).stdout
    assert printed.split()[0] == version and str(fresh.path) in printed
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_recipe_plans(fresh, listed, headers, tmp_path):  # noqa: F811
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "d2moe_mixtral").write_text("model: x\nsteps: [{decompose: svdd}]\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "d2moe_mixtral").mkdir()  # a directory is no recipe
    commands = [
        (tmp_path / "run", ["plan", "d2moe_mixtra"]),
        (tmp_path / "mine", ["plan", "d2moe_mixtral"]),
    ]
    for name, row in listed.items():
        model = ["--model", str(headers(row["model"]))]
        line = ["plan", name, *model, "--json"]
        if row["command"] == "compare":
            line = ["compare", "--plan", name, *model, "--remove", "0.4", "--json"]
        commands.append((tmp_path / "run", line))
    (tmp_path / "commands.json").write_text(json.dumps(commands, default=str))
    done = fresh.run("python", "-c", MANY, tmp_path / "commands.json", cwd=tmp_path)
    missed, mine, *found = [json.loads(line) for line in done.stdout.splitlines()]
    assert missed[0] == 2 and "(did you mean 'd2moe_mixtral'?)" in missed[2]
    assert mine[0] == 2 and "did you mean 'svd'?" in mine[2]  # a file of that name goes first
    for (_, line), (code, out, err) in zip(commands[2:], found, strict=True):
        assert code == 0, (line, err)
        if line[0] == "plan":
            # Written where the user is, not where the recipe lies.
            assert json.loads(out)["output"]["path"] == f"runs/{line[1]}", line
        else:
            assert len(json.loads(out)) > 10  # its rows, none of them refused
    assert not (tmp_path / "run" / "runs").exists()


def test_recipes_are_printed(fresh):  # noqa: F811
    shown = fresh.run("mctk", "recipes", "show", "d2moe_mixtral").stdout
    assert shown == (ROOT / "recipes" / "d2moe_mixtral.yaml").read_text()


CONSUMER = """
from pathlib import Path

import mctk
import torch

run: mctk.CompressedModel = mctk.compress("model", recipe="d2moe_mixtral", output=Path("out"))
sizes: dict[str, object] = mctk.plan(recipe={"model": "m", "steps": []})
bank = mctk.apply("svd", torch.ones(3, 4), size=2)
named = mctk.apply("svd", {"experts.up": torch.ones(2, 3, 4)}, size=0.5)
count: int = bank.parameters() + named["experts.up"].parameters()
states: list[str] = [row.status for row in mctk.compare(["a.yaml"], remove=[0.2]).rows]
version: str = mctk.__version__
"""
WRONG = """
number: int = run.report
mctk.compress("model")
mctk.comppress
"""


def test_a_users_script_is_checked_against_its_types(fresh, tmp_path):  # noqa: F811
    (tmp_path / "right.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(CONSUMER + WRONG)
    # Without torch's own types, which take minutes: tensors are Any.
    heavy = "torch.*,transformers.*,scipy.*,numpy.*,rich.*,pydantic.*"
    config = f"[mypy]\n[mypy-{heavy}]\nfollow_imports = skip\nignore_missing_imports = True\n"
    (tmp_path / "mypy.ini").write_text(config)
    done = fresh.run("python", "-m", "mypy", "--no-error-summary", ".", cwd=tmp_path, check=False)
    found = [line.split(": error:")[0] for line in done.stdout.splitlines() if "error:" in line]
    first = CONSUMER.count("\n") + 2
    assert found == [f"wrong.py:{first + n}" for n in range(WRONG.count("\n") - 1)], done.stdout
