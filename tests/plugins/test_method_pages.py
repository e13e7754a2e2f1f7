"""Every method has a page that names its options, and the recipes on the pages are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

PAGES = Path(__file__).resolve().parents[2] / "docs" / "methods"
REST = {
    "model": "some/model",
    "budget": {"remove": 0.4},
    "allocate": {"method": "uniform"},
    "calibration": {"dataset": "wikitext2"},
    "steps": [{"decompose": "svd_llm", "size": "auto"}],
}


def text(name):
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def test_every_method_has_a_page_with_its_options():
    for method in load_plugins().methods():
        shared = PAGES / f"{method.stage}.md"
        page = text(method.stage if shared.exists() else method.name)
        assert method.name in page
        for option in method.Options.model_fields:
            assert f"`{option}`" in page, f"{method.stage}/{method.name}: {option}"


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_recipes_on_the_pages_are_valid(page):
    for block in re.findall(r"```yaml\n(.*?)```", text(page), flags=re.DOTALL):
        load_recipe({**REST, **yaml.safe_load(block)})
