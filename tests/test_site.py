"""The documentation's site builds without a warning, and its made pages say what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mctk.cli import COMMANDS
from mctk.recipe.shipped import shipped_recipes
from mctk.registry import load_plugins

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `strict` makes every warning, such as a dead link, an error."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


def test_it_has_a_page_for_each_of_the_files(site):
    for page in (ROOT / "docs").rglob("*.md"):
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file(), page
        assert "<h1" in built.read_text(), page


def test_its_references_are_whole(site):
    def ids(page):
        return set(re.findall(r'<h[23] id="([^"]+)"', (site / page).read_text()))

    methods = {f"{m.stage}{m.name}" for m in load_plugins().methods()}
    assert methods <= ids("reference/options.html")
    assert {f"mctk-{name}" for name in COMMANDS} <= ids("reference/commands.html")
    assert set(shipped_recipes()) <= ids("reference/shipped.html")
    keys = (site / "reference/keys.html").read_text()
    for key in ("steps[].size.keep", "calibration.mix[].weight", "rows[].budgets"):
        assert f"<code>{key}</code>" in keys


def test_it_loads_nothing_from_elsewhere(site):
    """It can be read from a disk: no script, style, font or picture of another place."""
    for page in site.rglob("*.html"):
        found = re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', page.read_text())
        assert not found, page
