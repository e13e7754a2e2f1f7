"""`mctk new-plugin`: of every stage, a package whose own test passes as it is written."""

from __future__ import annotations

import importlib
import sys
import tomllib

import mctk_allocate
import mctk_svd
import pytest
import yaml
from mctk import cli, testing
from mctk.hookspecs import SPEC, STAGES
from mctk.recipe import load_recipe
from mctk.registry import Registry


@pytest.fixture
def written(tmp_path, monkeypatch, mctk):
    """Writes a package with a stage's method `my_thing`; its directory, and plugins with it."""

    def write(stage):
        code, out, err = mctk("new-plugin", "my_thing", "--stage", stage, "-o", tmp_path / "made")
        assert (code, err) == (0, "")
        monkeypatch.syspath_prepend(str(tmp_path / "made"))
        module = importlib.import_module("mctk_my_thing")
        given = {"allocate": mctk_allocate, "svd": mctk_svd, "my_thing": module}
        return tmp_path / "made", Registry(given), out

    yield write
    sys.modules.pop("mctk_my_thing", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_plugin_passes_its_own_test(stage, written, models, monkeypatch):
    directory, registry, out = written(stage)
    assert f"a plugin with the method {stage}/my_thing" in out
    info = registry.plugin_of(registry.method(stage, "my_thing"))
    assert (info.methods, info.error) == ([f"{stage}/my_thing"], None)
    asked = []

    def here(name, **settings):
        """The kit as that test calls it, on one family, with a plugin that is not installed."""
        settings |= {"families": ["mixtral"], "registry": registry, "models": models}
        asked.append(testing.check_method(name, **settings))
        assert not asked[-1].findings, str(asked[-1])

    monkeypatch.setattr(testing, "assert_conforms", here)
    names = {"__name__": "test_my_thing"}
    source = (directory / "tests" / "test_my_thing.py").read_text()
    exec(compile(source, "test_my_thing.py", "exec"), names)
    names["test_it_conforms"]()
    assert asked[0].method == f"{stage}/my_thing"
    assert asked[0].calls


@pytest.mark.parametrize("stage", STAGES)
def test_the_package_says_how_it_is_installed_and_used(stage, written):
    directory, registry, _ = written(stage)
    project = tomllib.loads((directory / "pyproject.toml").read_text())
    assert project["project"]["name"] == "mctk-my-thing"
    assert project["project"]["dependencies"] == ["mctk"]
    assert project["project"]["entry-points"]["mctk"] == {"my_thing": "mctk_my_thing"}
    assert project["tool"]["setuptools"]["py-modules"] == ["mctk_my_thing"]
    readme = (directory / "README.md").read_text()
    recipe = yaml.safe_load(readme.partition("```yaml\n")[2].partition("```")[0])
    rest = {"model": "some/model", "calibration": {"dataset": "wikitext2"}}
    load_recipe({**rest, **recipe}, registry=registry)
    assert f"mctk plugins show {stage}/my_thing" in readme
    assert sys.modules["mctk_my_thing"].MCTK_SPEC == SPEC


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-thing", "'my-thing' should be of a-z, 0-9 and _, such as my_thing"),
        ("MyThing", "such as mything"),
        ("3d", "such as my_svd"),
        ("", "such as my_svd"),
        ("lambda", "'lambda' is a word of Python"),
        ("none", "'none' is a word of Python"),
        ("method", "makes a class Method, which the module imports"),
        ("low_rank", "makes a class LowRankOptions, which the module imports"),
        ("svd", "decompose/svd is a method of plugin 'svd'"),
        ("naee", "there is a plugin 'naee' already"),
        ("hookspec_test", "there is a module mctk_hookspec_test already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, message, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mctk_hookspec_test.py").write_text("")
    importlib.invalidate_caches()
    assert message in refused("new-plugin", name, "--stage", "decompose")
    assert [path.name for path in tmp_path.iterdir()] == ["mctk_hookspec_test.py"]


def test_what_is_there_is_not_written_over(tmp_path, refused, mctk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mctk-my-thing").mkdir()  # an empty directory will do
    assert mctk("new-plugin", "my_thing", "--stage", "merge")[0] == 0
    line = refused("new-plugin", "my_thing", "--stage", "prune")
    assert "mctk-my-thing: is there already; name another with --output" in line
    (tmp_path / "file").touch()
    assert "is there already" in refused("new-plugin", "a", "--stage", "prune", "-o", "file")


def test_a_wrong_stage_is_refused_with_those_that_there_are(mctk):
    code, _, err = mctk("new-plugin", "my_thing", "--stage", "shrink")
    assert code == 2
    assert all(stage in err for stage in STAGES)


def test_help_says_what_each_stage_starts_with(capsys):
    with pytest.raises(SystemExit):
        cli.main(["new-plugin", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {stage} " in text for stage in STAGES)
    assert "docs/write_a_plugin.md" in text
