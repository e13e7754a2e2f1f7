"""Pages for users: their commands run, and print what stands there.

docs/quick_start.md from top to bottom, its run with less text; docs/troubleshooting.md mistake by
mistake. In blocks of output `...` stands for anything.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import errors
from mctk.cli import main
from mctk.comparison.file import load_comparison
from mctk.hub import explain
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

from tests.planning.true_configs import DEEPSEEK_MOE_16B
from tests.planning.true_headers import write_model

ROOT = Path(__file__).parents[1]
MODEL = (ROOT / "docs" / "your_model.md").read_text()
START = (ROOT / "docs" / "quick_start.md").read_text()
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
TEXTS = ("wordnet", "docs", "code", "bible")
FEW = ["--set", "calibration.sequences=4", "--set", "calibration.length=64"]
SHORT = ", ".join(
    f"{{name: {name}, text: recipes/demo/text/test/{name}.jsonl, length: 64, windows: 2}}"
    for name in TEXTS
)
Shown = namedtuple("Shown", "language text")


def shown(page: str) -> list[Shown]:
    """The fenced blocks of a page, in order."""
    return [Shown(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.S | re.M)]


def mistakes() -> Iterator[Any]:
    """Section, command and output of every mistake that has a command."""
    for section in TROUBLE.split("\n## ")[1:]:
        listed = shown(section)
        for block, after in itertools.pairwise(listed):
            if block.language == "sh" and after.language == "text":
                slow = [pytest.mark.slow] if "--tasks" in block.text else []  # 14 000 are indexed
                title = section.partition("\n")[0]
                yield pytest.param(title, block.text.strip(), after.text, marks=slow)


def pattern(text: str) -> str:
    """A regular expression for a block of output; pages break long lines."""
    words = (re.escape(word).replace(re.escape("..."), ".*") for word in text.split())
    return r"\s+".join(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory as of a clone, with the models that the pages speak of."""
    place = tmp_path_factory.mktemp("clone")
    (place / "recipes").symlink_to(ROOT / "recipes")
    write_model(place / "models" / "deepseek-moe-16b", DEEPSEEK_MOE_16B)
    quantised = shutil.copytree(ROOT / "recipes/demo/model", place / "models/Mixtral-8x7B-AWQ")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("MCTK_CACHE", str(place / "cache"))
        yield place


Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(place: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command of a page; returns its exit code and all that it printed."""

    def call(line: str, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        words = shlex.split(line)
        assert words[0] == "mctk"
        with pytest.raises(SystemExit) as done:
            main([*words[1:], *more])
        printed = capsys.readouterr()
        text = (printed.out + printed.err).replace(str(place), "...").replace(str(ROOT), "...")
        return int(done.value.code or 0), text

    return call


@pytest.fixture(scope="module")
def first(place: Path) -> Path:
    """The quick start's run, with less text."""
    [line] = [b.text for b in shown(START) if b.text.startswith("mctk run") and b.language == "sh"]
    more = [*FEW, "--set", f"evaluate.perplexity=[{SHORT}]"]
    with pytest.raises(SystemExit) as done:
        main([*shlex.split(line)[1:], *more])
    assert done.value.code == 0
    return place / "runs" / "first"


def words(line: str) -> tuple[str, ...]:
    """What a line says, without its figures."""
    return tuple(w for w in re.findall(r"[A-Za-z_]{2,}", line) if w not in ("left", "min"))


def test_what_the_quick_start_prints_before_it_compresses(call):
    printed = ""
    for block in shown(START.partition("## Compress")[0]):
        if block.language == "sh":
            code, printed = call(block.text)
            assert code == 0, printed
        elif block.language == "text":
            assert re.search(pattern(block.text), printed, re.S), printed


def test_the_quick_starts_run_prints_and_writes_what_the_page_shows(first):
    printed = (first / "run.log").read_text() + (first / "report.md").read_text()
    said = [words(line) for line in printed.splitlines()]
    part = START.partition("## Compress")[2].partition("## Use it")[0]
    for block in shown(part):
        if block.language == "text":
            for line in block.text.splitlines():
                if words(line) and not line.startswith("svd_llm, remove"):  # the terminal's title
                    assert any(set(words(line)) <= set(other) for other in said), line


def test_the_quick_starts_model_writes(first, capsys):
    [code] = [block.text for block in shown(START) if block.language == "python"]
    exec(code, {})
    assert capsys.readouterr().out.startswith("And it came to pass")


def test_the_quick_starts_last_commands(call):
    part = START.partition("## Compare")[2]
    lines = [b.text for b in shown(part) if b.language == "sh"]
    for line in "".join(lines).splitlines():
        code, printed = call(line, *(["--plan"] if line.startswith("mctk compare") else []))
        assert code == 0, printed


@pytest.mark.parametrize(("section", "line", "output"), list(mistakes()))
def test_a_mistake_prints_what_the_page_says(section, line, output, call, first, monkeypatch):
    more = []
    if line.startswith("mctk run"):
        more = ["--set", "evaluate=null", "--set", "gate=false"]
    if "runs/first" in line and line.startswith("mctk run"):
        more = ["--set", f"evaluate.perplexity=[{SHORT}]", *FEW]
    if "library" in section:
        monkeypatch.setitem(sys.modules, "datasets", None)
    if "No GPU" in section:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "disk" in section:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    code, printed = call(line, *more)
    assert re.search(pattern(output), printed, re.S), printed
    assert code == (2 if "Error:" in output else 0)


def test_the_warning_of_experts_without_tokens_is_in_the_report(call, place):
    section = TROUBLE.partition("## Experts that no token reached")[2]
    [line, _, warning] = [block.text for block in shown(section)[:3]]
    call(line, "--set", "evaluate=null", "--set", "gate=false")
    assert re.search(pattern(warning), (place / "runs" / "few" / "report.md").read_text())


def test_loading_without_mctk_says_what_is_missing(first, place):
    section = TROUBLE.partition("## Loading without mctk")[2]
    [code, output] = [block.text for block in shown(section)[:2]]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(pattern(output), done.stderr, re.S), done.stderr


def test_what_the_hub_refuses_reads_as_on_the_page():
    section = TROUBLE.partition("## The model is not found")[2].partition("\n## ")[0]
    said = " ".join(shown(section)[-1].text.split())
    answer = {"response": SimpleNamespace(headers={}, request=None)}
    name = "mistralai/Mixtral-8x7B-v0.1"
    messages = [
        explain(errors.RepositoryNotFoundError("404", **answer), "mistralai/Mixtral-8x7"),
        explain(errors.GatedRepoError("401", **answer), name),
        explain(errors.RevisionNotFoundError("404", **answer), name, "v2"),
    ]
    assert said == " ".join(messages)


def test_the_recipe_and_the_comparison_of_your_model_load():
    registry = load_plugins()
    [recipe] = [yaml.safe_load(block.text) for block in shown(MODEL) if block.language == "yaml"]
    assert load_recipe(recipe, registry=registry).budget.remove == 0.3
    [rows] = re.findall(r"^```yaml comparison\n(.*?)^```$", MODEL, re.S | re.M)
    assert len(load_comparison(yaml.safe_load(rows), registry=registry).rows) == 4


def test_the_page_has_at_least_ten_mistakes():
    assert len({mistake.values[0] for mistake in mistakes()}) >= 10
