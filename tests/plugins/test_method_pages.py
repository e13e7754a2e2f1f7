"""Every method has a page that names its options, and the recipes on the pages are valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "methods"
REST = {
    "model": "some/model",
    "budget": {"remove": 0.4},
    "allocate": {"method": "uniform"},
    "calibration": {"dataset": "wikitext2"},
    "steps": [{"decompose": "svd_llm", "size": "auto"}],
}


def text(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def page_of(method, plugin):
    """A page of its own, its stage's, or one for all methods of its plugin."""
    found = [
        name for name in (method.name, method.stage, plugin) if (PAGES / f"{name}.md").exists()
    ]
    assert found, f"{method.stage}/{method.name}: docs/methods/ has no page for it"
    # Plugins share stages: the page of a stage need not be of this method's plugin.
    return next((name for name in found if sections_about(name, method)), found[0])


def sections_about(page, method):
    """The text below every heading that names the method, up to the next of the same level."""
    found = []
    parts = re.split(
        r"^(#+) (.*)$", re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S), flags=re.M
    )
    headings = list(zip(parts[1::3], parts[2::3], parts[3::3], strict=True))
    name = rf"(?<![\w/-])(?:{method.stage}/)?{method.name}(?![\w-])"
    for at, (level, heading, body) in enumerate(headings):
        if re.search(name, heading):
            found.append(body)
            for below, _, more in headings[at + 1 :]:
                if len(below) <= len(level):
                    break
                found.append(more)
    return "\n".join(found)


def test_the_plugins_here_are_those_that_the_project_declares():
    """Or methods of one that the installation does not know would go unchecked."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "mctk"
    ]
    registry = load_plugins()
    found = {info.name for info in registry.plugins() if info.distribution == "mctk"}
    assert found == set(declared), "install the project again: pip install -e ."
    assert {registry.plugin_of(method).name for method in registry.methods()} >= set(declared)


@pytest.mark.parametrize("method", load_plugins().methods(), ids=lambda m: f"{m.stage}/{m.name}")
def test_every_method_has_a_page_with_its_options(method):
    page = page_of(method, load_plugins().plugin_of(method).name)
    found = sections_about(page, method)
    assert found, f"docs/methods/{page}.md has no heading with {method.stage}/{method.name}"
    rows = re.findall(r"^\| (.*?) \|", found, flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    missing = set(method.Options.model_fields) - documented
    assert not missing, f"{method.stage}/{method.name}: no row in docs/methods/{page}.md"


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_recipes_on_the_pages_are_valid(page):
    for block in re.findall(r"```yaml\n(.*?)```", text(page), flags=re.DOTALL):
        load_recipe({**REST, **yaml.safe_load(block)})
