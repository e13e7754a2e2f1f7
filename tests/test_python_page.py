"""Every snippet of docs/python.md runs, in order, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import mctk
import pytest

from tests.tiny_run import TEXT, mixtral  # noqa: F401 (fixture)

PAGE = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(mixtral, tmp_path_factory):  # noqa: F811
    """A directory with what the page's paths name."""
    root = tmp_path_factory.mktemp("notebook")
    (root / "model").symlink_to(mixtral)
    (root / "text").mkdir()
    for name, source in (("some", "calibration"), ("test", "test")):
        lines = (TEXT / source / "code.jsonl").read_text(encoding="utf-8").splitlines(True)
        (root / "text" / f"{name}.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def names():
    """What the snippets before have defined."""
    return {}


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, place, names, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MCTK_CACHE", str(place / "cache"))
    exec(SNIPPETS[number], names)
    said = re.findall(r"^ +print\(error\)  # \.\.\. (.*)$", SNIPPETS[number], flags=re.MULTILINE)
    printed = capsys.readouterr().out
    assert all(text in printed for text in said)


def test_snippets_are_found():
    assert len(SNIPPETS) == PAGE.count("```python") >= 6


def test_the_page_names_every_function():
    for name in set(mctk.__all__) - {"__version__", "CompressedModel", "UserError"}:
        assert f"| `mctk.{name}(" in PAGE
    for name in ("CompressedModel", "UserError"):
        assert name in PAGE
