"""The plugin of docs/write_a_plugin.md: taken out of the page, installed, used, uninstalled."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mctk.comparison.file import load_comparison
from mctk.hookspecs import SPEC
from mctk.recipe import load_recipe
from mctk.registry import Registry

from tests.fresh_venv import fresh, wheel  # noqa: F401 (fixtures)
from tests.tiny_run import DEMO, mixtral  # noqa: F401

PAGE = Path(__file__).parents[1] / "docs" / "write_a_plugin.md"
LOAD = """
import sys, torch, mctk
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(model(torch.arange(5, 25)[None]).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The blocks of the page that say which file they are."""
    found = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE.read_text(), re.S | re.M)
    return dict(found)


def code_lines(text: str) -> int:
    """Lines that are no blank, comment or docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def test_it_is_short(files):
    assert set(files) == {"pyproject.toml", "mctk_ream.py", "tests/test_ream.py", "ream.yaml"}
    assert code_lines(files["mctk_ream.py"]) <= 60


def test_its_recipe_and_its_comparison_are_valid(files):
    made: dict[str, Any] = {}
    exec(files["mctk_ream.py"], made)
    points = metadata.entry_points(group="mctk")
    ours = SimpleNamespace(methods=made["methods"], MCTK_SPEC=made["MCTK_SPEC"])
    registry = Registry({**{point.name: point.load() for point in points}, "ream": ours})
    assert [info.error for info in registry.plugins() if info.broken] == []
    assert made["MCTK_SPEC"] == SPEC, "the page is of an older version of the hooks"
    loaded = load_comparison(yaml.safe_load(files["ream.yaml"]), registry=registry)
    assert len(loaded.rows) == 6 * 2  # at two budgets
    [recipe] = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.S | re.M)
    load_recipe({"model": "some/model", **yaml.safe_load(recipe)}, registry=registry)


def test_it_is_installed_used_and_uninstalled(files, fresh, mixtral, tmp_path):  # noqa: F811
    source = tmp_path / "mctk-ream"
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    settings = {
        "model": str(mixtral),
        "calibration": {
            "text": str(DEMO / "text" / "calibration" / "*.jsonl"),
            "sequences": 8,
            "length": 64,
            "batch": 4,
        },
    }
    steps = [{"prune": "ream", "options": {"group": 2}}]
    recipe, comparison = tmp_path / "recipe.yaml", tmp_path / "comparison.yaml"
    one = {**settings, "budget": {"remove": 0.5, "of": "experts"}, "steps": steps, "gate": False}
    rows = [{"name": "ours", "steps": steps}, {"name": "reap", "steps": [{"prune": "reap"}]}]
    two = {**settings, "budgets": {"remove": [0.5], "of": "experts"}, "rows": rows, "gate": False}
    recipe.write_text(yaml.safe_dump(one))
    comparison.write_text(yaml.safe_dump(two))
    out = tmp_path / "out"

    fresh.install(source)
    try:
        shown = fresh.run("mctk", "plugins").stdout
        assert re.search(r"^prune +ream +1 +ream \(mctk-ream 0\.1\.0\) ", shown, re.M)
        assert "broken" not in shown
        fresh.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", source / "tests")
        plan = json.loads(fresh.run("mctk", "plan", recipe, "--json").stdout)
        fresh.run("mctk", "run", recipe, "-o", out)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["sizes"]["attained"]["parameters"] == plan["sizes"]["planned"]["parameters"]
        assert metrics["versions"]["mctk-ream"] == "0.1.0"
        [note, *_] = [note for layer in metrics["layers"] for note in layer["notes"]]
        assert re.fullmatch(r"\d\+\d\+\d; \d", note["text"])  # N' = 2 of N = 4, C = 2
        table = fresh.run("mctk", "compare", comparison, "-q", "-o", tmp_path / "compared").stdout
        assert {"ours", "reap"} <= set(re.findall(r"^\W*(\w+)", table, re.M))
        before = fresh.run("python", "-c", LOAD, out).stdout
    finally:
        fresh.pip("uninstall", "-y", "mctk-ream")

    assert not re.search(r"\bream\b", fresh.run("mctk", "plugins").stdout)
    assert fresh.run("python", "-c", LOAD, out).stdout == before
    failed = fresh.run("mctk", "run", recipe, "-o", tmp_path / "again", check=False)
    assert failed.returncode == 2
    assert "key steps.0.prune: no method 'ream' for stage prune" in failed.stderr
    assert "mctk plugins lists what is installed, another plugin may bring it" in failed.stderr
    assert not (tmp_path / "again").exists()
