import hashlib
import inspect
import re
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from fake_plugin import Drop, FakePlugin, Truncate, TruncateOptions, fake_registry
from mctk.errors import UserError
from mctk.hookspecs import OLDEST, SPEC, STAGES, Method, MethodOptions, Plugin, hookimpl
from mctk.registry import Registry, load_plugins
from pydantic import BaseModel, ConfigDict, Field


def test_methods_come_by_stage_and_name():
    registry = fake_registry()
    names = [(method.stage, method.name) for method in registry.methods()]
    assert names == [
        ("allocate", "greedy"),
        ("allocate", "uniform"),
        ("decompose", "score"),
        ("decompose", "truncate"),
        ("prune", "drop"),
    ]
    assert [method.name for method in registry.methods("prune")] == ["drop"]
    method = registry.method("decompose", "truncate")
    assert isinstance(method, Truncate)
    assert registry.plugin_of(method).name == "fake"


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("decompose", "trunkate", r"no method 'trunkate' .*\(did you mean 'truncate'\?\)"),
        ("decompose", "drop", "'drop' is a method of stage prune"),
        ("merge", "mean", "no plugin brings one"),
    ],
)
def test_an_unknown_method_is_named_with_the_nearest(stage, name, message):
    with pytest.raises(UserError, match=message):
        fake_registry().method(stage, name)


class WrongArgument(Truncate):
    name = "wrong"

    def decompose(self, bank, statistics, size, opts):
        return []


class LeftOut(Truncate):
    name = "short"

    def decompose(self, bank, statistics, options):
        return []


class Reordered(Truncate):
    name = "reordered"

    def decompose(self, bank, size, statistics, options):
        return []


class WrongHelper(Truncate):
    name = "needs"

    def needs(self, bank, options, extra):
        return []


class NoHook(Method):
    stage = "merge"
    name = "nothing"
    summary = "Implements no hook of its stage."


class NoCurve(Method):
    stage = "decompose"
    name = "curveless"
    summary = "Takes a size and has no curve."
    takes_size = True
    decompose = Truncate.decompose
    sizes = Truncate.sizes


class UnknownStage(Truncate):
    stage = "squash"


class NoSummary(Drop):
    name = "terse"
    summary = ""


class Layered(Truncate):
    scope = "layer"


class LooseOptions(TruncateOptions):
    model_config = ConfigDict(extra="ignore")


class Misspelt(Truncate):
    units = "squared"


class Loose(Truncate):
    Options = LooseOptions


class Foreign(Truncate):
    class Options(BaseModel):
        pass


class Undescribed(Truncate):
    class Options(MethodOptions):
        rank: int = Field(3)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (WrongArgument(), "argument opts is not in the hook specification"),
        (LeftOut(), r"must take \(bank, statistics, size, options\)"),
        (Reordered(), r"must take \(bank, statistics, size, options\)"),
        (WrongHelper(), "argument extra is not in the hook specification"),
        (NoHook(), r"hook merge\(\) is not implemented"),
        (NoCurve(), r"hook curve\(\) is not implemented"),
        (UnknownStage(), "'squash' is none of allocate"),
        (NoSummary(), "class attribute 'summary' is missing"),
        (Layered(), "scope 'layer' does not go with decompose"),
        (Misspelt(), "class attribute units = 'squared' is none of"),
        (Loose(), "Options must forbid extra fields"),
        (Foreign(), "not a subclass of mctk.hookspecs.MethodOptions"),
        (Undescribed(), "option 'rank' has no description"),
        ("text", "not an instance of mctk.hookspecs.Method"),
    ],
)
def test_a_broken_method_is_recorded_and_the_others_stay(method, message):
    registry = fake_registry([Drop(), method])
    (info,) = registry.plugins()
    assert info.methods == ["prune/drop"]
    assert registry.method("prune", "drop").name == "drop"
    assert re.search(message, info.error)
    assert "Traceback" in info.traceback


def test_a_recipe_that_names_a_broken_method_hears_why():
    registry = fake_registry([WrongArgument()])
    with pytest.raises(UserError, match=r"decompose/wrong of plugin 'fake' is broken: .*opts"):
        registry.method("decompose", "wrong")


def test_the_second_plugin_with_a_name_is_refused():
    registry = Registry({"first": FakePlugin([Drop()]), "second": FakePlugin([Drop(), Truncate()])})
    first, second = registry.plugins()
    assert first.error is None
    assert second.methods == ["decompose/truncate"]
    assert "plugin 'first' brings prune/drop already" in second.error
    assert registry.plugin_of(registry.method("prune", "drop")) is first


def test_lifecycle_hooks_reach_all_plugins_of_this_registry_only():
    one, two, other = FakePlugin([]), FakePlugin([]), FakePlugin([])
    registry, _ = Registry({"one": one, "two": two}), Registry({"other": other})
    registry.call("layer_done", run="run", layer=4)
    assert one.layers == two.layers == [("run", 4)]
    assert other.layers == []


class Unmarked:
    def methods(self):
        return []


class Raising(FakePlugin):
    @hookimpl
    def methods(self):
        raise RuntimeError("no\nluck")


class HalfWay(FakePlugin):
    @hookimpl
    def methods(self):
        yield Drop()
        raise RuntimeError("no luck")


class Nothing(FakePlugin):
    @hookimpl
    def methods(self):
        return None


class NoNumber(FakePlugin):
    MCTK_SPEC = "1.0"


class TooNew(FakePlugin):
    MCTK_SPEC = SPEC + 1


class TooOld(FakePlugin):
    MCTK_SPEC = OLDEST - 1


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Unmarked(), r"TypeError: hook methods() is not marked with @hookimpl"),
        (object(), "TypeError: none of the hooks methods, kinds"),
        (Raising(), "RuntimeError: no luck"),
        (HalfWay(), "RuntimeError: no luck"),
        (Nothing(), "TypeError: methods() returned None, not a list of methods"),
        (NoNumber(), f"TypeError: MCTK_SPEC is '1.0'; write a number, such as {SPEC}"),
        (
            TooNew(),
            f"written for hook specifications {SPEC + 1}, and this mctk has {SPEC}: upgrade mctk",
        ),
        (
            TooOld(),
            f"written for hook specifications {OLDEST - 1}, and this mctk takes {OLDEST} to "
            f"{SPEC}: upgrade the plugin",
        ),
    ],
)
def test_a_broken_plugin_is_recorded_and_silent(plugin, message):
    registry = Registry({"bad": plugin, "good": FakePlugin()})
    bad, good = registry.plugins()
    assert message in bad.error and not bad.methods
    assert good.error is None and "prune/drop" in good.methods
    registry.call("layer_done", run="run", layer=0)
    assert getattr(plugin, "layers", []) == []
    with pytest.raises(UserError, match="plugin 'bad' could not be loaded"):
        registry.method("decompose", "unknown")


def _install(monkeypatch, tmp_path, modules):
    """Makes entry points of group mctk that load modules with the given source."""
    monkeypatch.syspath_prepend(str(tmp_path))
    points = []
    for name, source in modules.items():
        (tmp_path / f"plugin_{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"plugin_{name}", raising=False)
        points.append(metadata.EntryPoint(name, f"plugin_{name}", "mctk"))
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "mctk" else [])


GOOD = "from fake_plugin import *\n_plugin = FakePlugin()\nmethods = _plugin.methods\n"


def test_entry_points_are_loaded_and_failures_recorded(monkeypatch, tmp_path):
    monkeypatch.delenv("MCTK_PLUGINS", raising=False)
    modules = {
        "good": GOOD,
        "bad": "import no_such_module",
        "leaves": "raise SystemExit(3)",
        "typo": "def methods(:",
        "divides": "1 / 0",
        "gone": "from mctk.decompose import no_such_helper",
    }
    _install(monkeypatch, tmp_path, modules)
    registry = load_plugins()
    errors = {info.name: info.error for info in registry.plugins()}
    assert errors["good"] is None
    assert errors["bad"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert errors["leaves"] == "SystemExit: 3"
    assert errors["typo"].startswith("SyntaxError: ")
    assert "plugin_typo.py, line 1" in errors["typo"]
    assert errors["divides"] == "ZeroDivisionError: division by zero"
    assert errors["gone"].startswith("ImportError: cannot import name 'no_such_helper' from 'mctk.")
    with pytest.raises(UserError) as found:
        registry.method("decompose", "theirs")
    for name in ("bad", "leaves", "typo", "divides", "gone"):
        assert f"plugin '{name}' could not be loaded: {errors[name]}" in str(found.value)
    assert registry.method("prune", "drop").name == "drop"


@pytest.mark.parametrize(
    ("value", "names"), [("good", ["good"]), ("", []), (" b , good", ["b", "good"])]
)
def test_the_environment_selects_entry_points(monkeypatch, tmp_path, value, names):
    _install(monkeypatch, tmp_path, {"good": GOOD, "b": "import no_such_module"})
    monkeypatch.setenv("MCTK_PLUGINS", value)
    assert [info.name for info in load_plugins().plugins()] == names


def test_a_selected_plugin_that_is_not_installed_is_an_error(monkeypatch, tmp_path):
    _install(monkeypatch, tmp_path, {"good": GOOD})
    monkeypatch.setenv("MCTK_PLUGINS", "goot")
    with pytest.raises(UserError, match=r"'goot', which is not installed \(did you mean 'good'"):
        load_plugins()


def test_a_strangers_plugin_takes_no_name_of_ours(monkeypatch, tmp_path):
    """Whatever its own name: what a recipe means does not change by an installation."""
    monkeypatch.delenv("MCTK_PLUGINS", raising=False)
    _install(monkeypatch, tmp_path, {"aaa": GOOD, "ours": GOOD})
    points = metadata.entry_points(group="mctk")
    for point, name in zip(points, ("theirs", "mctk"), strict=True):
        point._for(SimpleNamespace(name=name, version="1.5"))
    registry = load_plugins()
    ours, theirs = registry.plugins()
    assert (ours.name, ours.error) == ("ours", None)
    assert (theirs.name, theirs.methods) == ("aaa", [])
    assert "plugin 'ours' (mctk 1.5) brings prune/drop already" in theirs.broken["prune/drop"]
    assert registry.method("prune", "drop").origin is ours


def test_two_plugins_of_one_name_and_one_under_two_names(monkeypatch, tmp_path):
    monkeypatch.delenv("MCTK_PLUGINS", raising=False)
    _install(monkeypatch, tmp_path, {"one": GOOD})
    one = metadata.EntryPoint("one", "plugin_one", "mctk")
    two = metadata.EntryPoint("two", "plugin_one", "mctk")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [one, one, two])
    registry = load_plugins()
    first, same, other = registry.plugins()
    assert first.error is None and registry.method("prune", "drop").origin is first
    assert same.error == "ValueError: plugin 'one' has that name already; uninstall one of the two"
    assert "already registered" in other.error
    assert len(registry.call("methods")) == 1  # the first is still there


def test_a_method_that_is_not_there_says_what_to_do():
    with pytest.raises(UserError, match=r"mctk plugins lists what is installed, another plugin"):
        fake_registry().method("prune", "ream")


def test_kinds_are_registered_under_the_plugin(monkeypatch):
    import mctk.terms

    class Kind:
        kind = "fake"

    class Kinds:
        @hookimpl
        def kinds(self):
            return [Kind]

    seen = []
    monkeypatch.setattr(
        mctk.terms, "register_kind", lambda cls, provider: seen.append((cls, provider))
    )
    Registry({"kinds": Kinds()}).register_kinds()
    assert seen == [(Kind, "kinds")]


def test_a_change_of_the_hooks_raises_their_version():
    """Plugins say which version they were written for: a hook must not change under them.

    Whoever changes a hook or a class attribute raises `hookspecs.SPEC`, and `OLDEST` as well if a
    plugin for the version before would no longer work, says so in CHANGELOG.md, and enters the
    digest here.
    """
    lines = []
    for owner in (Method, Plugin):
        for name, value in sorted(vars(owner).items()):
            if hasattr(value, "mctk_spec"):
                arguments = ", ".join(inspect.signature(value).parameters)
                lines.append(f"{owner.__name__}.{name}({arguments})")
        lines += [f"{name}: {kind}" for name, kind in sorted(owner.__annotations__.items())]
    digest = hashlib.sha256("\n".join([*lines, *STAGES]).encode()).hexdigest()[:16]
    assert {SPEC: digest} == {1: "3295f822be2a4495"}
    assert 1 <= OLDEST <= SPEC


def test_every_hook_is_documented_and_every_stage_is_a_hook():
    for owner in (Method, Plugin):
        for name, value in vars(owner).items():
            if hasattr(value, "mctk_spec"):
                assert value.__doc__, name
    for stage in STAGES:
        assert hasattr(getattr(Method, stage), "mctk_spec")
