"""What goes wrong in a plugin is told with its name, version, hook, bank and layer."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mctk import decompose
from mctk.decompose import LowRankOptions
from mctk.engine import run
from mctk.engine.passes import apply_step
from mctk.errors import MethodError, UserError
from mctk.hookspecs import SPEC, STAGES, Method, Plugin, hookimpl
from mctk.planning import make_plan
from mctk.recipe import load_recipe
from mctk.registry import Registry, load_plugins
from mctk.statistics import SecondMoment
from mctk.terms import DENSE, Bank, BankShape, Dense


class Sound(Method):
    """Low rank of a matrix's first columns; a subclass fails in one hook."""

    stage = "decompose"
    name = "failing"
    summary = "Fails."
    version = 7
    Options = LowRankOptions
    takes_size = True

    def sizes(self, banks, options):
        return decompose.sizes(banks, options)

    def layout(self, banks, size, options):
        return decompose.layout(banks, size, options)

    def curve(self, banks, statistics, options):
        return [float(-size) for size in decompose.sizes(banks, options)[0]]

    def decompose(self, bank, statistics, size, options):
        return list(bank.terms)


class Shares(Method):
    stage = "allocate"
    name = "failing"
    summary = "Fails."
    version = 7


def failing(base: type[Method], hook: str) -> Method:
    """A method of which one hook fails."""
    return type("Failing", (base,), {hook: spelled(Method, hook)})()


def spelled(owner: type, hook: str) -> Any:
    """A function that fails, with the arguments that the specification has."""
    own = ", ".join(inspect.signature(getattr(owner, hook)).parameters)
    made: dict[str, Any] = {}
    exec(f"def {hook}({own}):\n    raise KeyError('oops')", made)
    return made[hook]


def registry_with(*methods: Method, plugin: Any = None) -> Registry:
    """The installed plugins, and one of ours: of these methods, or the object given."""
    ours = plugin or SimpleNamespace(methods=hookimpl(lambda: list(methods)))
    points = metadata.entry_points(group="mctk")
    return Registry({**{point.name: point.load() for point in points}, "ours": ours})


@pytest.mark.parametrize("hook", ["needs", "sizes", "layout"])
def test_a_hook_that_fails_in_the_plan_is_named_with_bank_and_layer(hook, write_recipe):
    registry = registry_with(failing(Sound, hook))
    recipe = load_recipe(write_recipe(steps=[{"decompose": "failing"}]), registry=registry)
    with pytest.raises(MethodError) as found:
        make_plan(recipe, registry)
    assert str(found.value) == (
        "decompose/failing on experts.gate of layer 0 failed: KeyError: 'oops' "
        f"(in {hook}() of version 7, plugin 'ours')"
    )
    assert isinstance(found.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("hook", "result", "message"),
    [
        (
            "needs",
            lambda self, shape, bank, options: ["Fisher"],
            "asks for 'Fisher', which is no need",
        ),
        (
            "needs",
            lambda self, shape, bank, options: [SecondMoment("experts.gaet", "input")],
            "the layer has no such bank (did you mean 'experts.gate'?)",
        ),
        ("sizes", lambda self, banks, options: ([8], [100]), "DENSE must be the last"),
        ("sizes", lambda self, banks, options: ([8, 4, DENSE], [9, 5, 10]), "settings must ascend"),
        (
            "curve",
            lambda self, banks, statistics, options: [
                math.nan for _ in decompose.sizes(banks, options)[0]
            ],
            "not finite, or negative",
        ),
        (
            "decompose",
            lambda self, bank, statistics, size, options: [*bank.terms, *bank.terms],
            "its layout() says",
        ),
    ],
)
def test_results_that_cannot_be_are_refused_where_they_are_made(
    hook, result, message, write_recipe, cache
):
    """And not at the end of the run, by a gate that knows no method."""
    registry = registry_with(type("Wrong", (Sound,), {hook: result})())
    allocate = "by_loss" if hook == "curve" else "uniform"
    path = write_recipe(allocate={"method": allocate}, steps=[{"decompose": "failing"}])
    with pytest.raises(MethodError) as found:
        run([load_recipe(path, registry=registry)], registry, cache=cache)
    assert message in str(found.value)
    assert str(found.value).startswith("decompose/failing on experts.gate of layer 0 failed: ")
    assert f"(in {hook}() of version 7, plugin 'ours')" in str(found.value)


def test_an_allocator_that_fails_is_named(write_recipe):
    registry = registry_with(failing(Shares, "allocate"))
    path = write_recipe(allocate={"method": "failing"}, steps=[{"decompose": "svd"}])
    with pytest.raises(
        MethodError,
        match=r"allocate/failing failed: KeyError: 'oops' \(in allocate\(\) of version 7, plugin",
    ):
        make_plan(load_recipe(path, registry=registry), registry)


def test_a_curve_that_fails_is_named(write_recipe, cache):
    registry = registry_with(failing(Sound, "curve"))
    path = write_recipe(allocate={"method": "by_loss"}, steps=[{"decompose": "failing"}])
    with pytest.raises(
        MethodError,
        match=r"failing on experts.gate of layer 0 failed: KeyError: 'oops' \(in curve\(\)",
    ):
        run([load_recipe(path, registry=registry)], registry, cache=cache)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "allocate"])
def test_the_hook_of_every_stage_is_named(stage):
    attributes = {"stage": stage, "name": "failing", "summary": "Fails."}
    registry_with(method := failing(type("Base", (Method,), attributes), stage))
    shape = BankShape(2, 3, 4)
    bank = Bank("experts.up", 5, shape, [Dense(shape, range(2), torch.ones(2, 3, 4))])
    step = SimpleNamespace(stage=stage, method=method, options=None)
    with pytest.raises(MethodError) as found:
        apply_step(step, ["experts.up"], {"experts.up": bank}, {"experts.up": bank}, None, 1)
    assert str(found.value) == (
        f"{stage}/failing on experts.up of layer 5 failed: KeyError: 'oops' "
        f"(in {stage}() of version 1, plugin 'ours')"
    )


def test_what_a_user_can_mend_is_told_with_its_place():
    class Refuses(Sound):
        def decompose(self, bank, statistics, size, options):
            raise UserError("too small")

    shape = BankShape(1, 3, 4)
    bank = Bank("mlp.up", 5, shape, [Dense(shape, [0], torch.ones(1, 3, 4))])
    step = SimpleNamespace(stage="decompose", method=Refuses(), options=None)
    with pytest.raises(UserError, match=r"^decompose/failing on mlp.up of layer 5: too small$"):
        apply_step(step, ["mlp.up"], {"mlp.up": bank}, {"mlp.up": bank}, None, 1)


def test_what_a_user_can_mend_stays_as_it_was_said(write_recipe):
    class Refuses(Sound):
        def sizes(self, banks, options):
            raise UserError("put this step first")

    registry = registry_with(Refuses())
    recipe = load_recipe(write_recipe(steps=[{"decompose": "failing"}]), registry=registry)
    with pytest.raises(UserError, match=r"key steps\.0: put this step first$") as found:
        make_plan(recipe, registry)
    assert not isinstance(found.value, MethodError)


@pytest.mark.parametrize("hook", ["run_started", "layer_done", "table_columns"])
def test_a_plugins_own_hook_that_fails_is_named(hook, write_recipe, cache):
    """It is called in every run, whatever the recipe names: the message says how to do without."""
    plugin = type("Ours", (), {hook: hookimpl(spelled(Plugin, hook))})()
    registry = registry_with(plugin=plugin)
    recipe = load_recipe(write_recipe(steps=[{"decompose": "svd"}]), registry=registry)
    with pytest.raises(MethodError) as found:
        run([recipe], registry, cache=cache)
    assert str(found.value) == (
        f"plugin 'ours' failed in {hook}(): KeyError: 'oops' (MCTK_PLUGINS can leave it out)"
    )


def test_kinds_that_fail_stop_those_who_use_the_plugin_and_nobody_else(write_recipe):
    class Mine:
        kind = "dense"  # is there already

    ours = {"methods": lambda: [Sound()], "kinds": lambda: [Mine]}
    registry = registry_with(
        plugin=SimpleNamespace(**{hook: hookimpl(own) for hook, own in ours.items()})
    )
    other = load_recipe(write_recipe("other", steps=[{"decompose": "svd"}]), registry=registry)
    make_plan(other, registry)
    info = registry.plugin_of(registry.method("decompose", "failing"))
    assert "term kind 'dense' of ours is already provided by mctk" in info.error
    own = load_recipe(write_recipe("own", steps=[{"decompose": "failing"}]), registry=registry)
    with pytest.raises(MethodError, match=r"plugin 'ours' failed in kinds\(\): ValueError: term"):
        make_plan(own, registry)


def test_versions_are_recorded(write_recipe, cache):
    recipe = load_recipe(write_recipe(steps=[{"decompose": "svd"}]))
    recipe.steps[0].method.origin.distribution = "mctk-other"  # as if it came from elsewhere
    recipe.steps[0].method.origin.version = "3.1"
    [metrics] = run([recipe], load_plugins(), cache=cache)
    assert metrics["versions"]["hook specifications"] == str(SPEC)
    assert metrics["versions"]["mctk-other"] == "3.1"


def test_the_command_line_says_where_on_demand(tmp_path):
    (tmp_path / "broken_method.py").write_text(
        "from mctk.hookspecs import Method, hookimpl\n"
        "class Broken(Method):\n"
        "    stage, name, summary = 'merge', 'broken', 'Fails.'\n"
        "    def needs(self, shape, bank, options):\n"
        "        return shape.no_such_thing\n"
        "    def merge(self, layer, statistics, size, options):\n"
        "        return {}\n"
        "@hookimpl\n"
        "def methods():\n"
        "    return [Broken()]\n"
    )
    distribution = tmp_path / "broken-1.2.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (distribution / "entry_points.txt").write_text("[mctk]\nbroken = broken_method\n")
    program = "from mctk.cli import main; main()"

    def show(*more):
        done = subprocess.run(
            [sys.executable, "-c", program, "plugins", "show", "broken", *more],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 2
        return done.stderr

    assert show().splitlines() == [
        "Error: merge/broken failed: AttributeError: 'BankShape' object has no attribute "
        "'no_such_thing' (in needs() of version 1, plugin 'broken' (broken 1.2))",
        "--debug shows where in the plugin.",
    ]
    shown = show("--debug")
    assert 'broken_method.py", line 5, in needs' in shown
    assert "--debug shows" not in shown
