"""Finds plugins, checks them, and hands out the methods that a recipe names.

A plugin that cannot be loaded, or a method that does not fit its hooks, is recorded with its
traceback and never stops a command that does not name it. Each `Registry` has its own plugin
manager, so two of them live side by side in one process.
"""

from __future__ import annotations

import copy
import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import pluggy

from mctk import hookspecs
from mctk.errors import UserError, nearest
from mctk.hookspecs import STAGES, Method, MethodOptions

GROUP = "mctk"
SELECTION = "MCTK_PLUGINS"
# In the order of the spec, `self` left out: overriding one of these implements it.
_METHOD_HOOKS = {
    name: tuple(inspect.signature(value).parameters)[1:]
    for name, value in vars(Method).items()
    if hasattr(value, "mctk_spec")
}


@dataclass
class PluginInfo:
    """A plugin as found: what it brings, or why it cannot be used.

    Attributes:
        name: Name of its entry point.
        version: Version of the distribution that provides it ("" for one given in code).
        distribution: That distribution's name ("" for one given in code).
        methods: "stage/name" of every method that may be used.
        broken: "stage/name" of a method, or "" for the whole plugin, to what is wrong with it.
        traceback: Where the first of these came from, for `mctk plugins --debug`.
    """

    name: str
    version: str = ""
    distribution: str = ""
    methods: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    traceback: str = ""

    @property
    def error(self) -> str | None:
        """Everything that is wrong with the plugin in one line, or None."""
        lines = [f"{at}: {what}" if at else what for at, what in self.broken.items()]
        return "; ".join(lines) or None


class _Manager(pluggy.PluginManager):
    """Takes every overridden hook of a `Method` as implemented, so that none goes unchecked."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        marked = super().parse_hookimpl_opts(plugin, name)
        if marked is not None or not (isinstance(plugin, Method) and implements(plugin, name)):
            return marked
        return pluggy.HookimplOpts(
            wrapper=False,
            hookwrapper=False,
            optionalhook=False,
            tryfirst=False,
            trylast=False,
            specname=None,
        )


class Registry:
    """The plugins of one process, or exactly those given.

    Args:
        plugins: Modules or objects with plugin hooks, each optionally under a name:
            `[module]` or `{"name": module}`. Entry points are not looked at then.
    """

    def __init__(self, plugins: Iterable[Any] | Mapping[str, Any] | None = None) -> None:
        self._manager = _Manager("mctk")
        self._manager.add_hookspecs(hookspecs.Plugin)
        self._manager.add_hookspecs(Method)
        self._methods: dict[tuple[str, str], Method] = {}
        self._owners: dict[tuple[str, str], PluginInfo] = {}
        self._plugins: list[PluginInfo] = []
        if plugins is None:
            self._add_entry_points()
            return
        if not isinstance(plugins, Mapping):
            plugins = {getattr(it, "__name__", None) or type(it).__name__: it for it in plugins}
        for name, plugin in plugins.items():
            self._add(PluginInfo(name), partial(_given, plugin))

    @property
    def hook(self) -> Any:
        """Calls a hook of all plugins, e.g. `registry.hook.run_started(run=run)`."""
        return self._manager.hook

    def plugins(self) -> list[PluginInfo]:
        """Returns every plugin that was found, broken ones too, in the order of loading."""
        return list(self._plugins)

    def methods(self, stage: str | None = None) -> list[Method]:
        """Returns the methods of one stage, or of all, by stage and name."""
        chosen = [key for key in self._methods if stage in (None, key[0])]
        chosen.sort(key=lambda key: (STAGES.index(key[0]), key[1]))
        return [self._methods[key] for key in chosen]

    def method(self, stage: str, name: str) -> Method:
        """Returns the method that a recipe names.

        Raises:
            UserError: If there is none, with the nearest name; or if it, or a plugin that may have
                brought it, is broken.
        """
        found = self._methods.get((stage, name))
        if found is not None:
            return found
        key = f"{stage}/{name}"
        for info in self._plugins:
            if key in info.broken:
                what = info.broken[key]
                raise UserError(f"method {key} of plugin '{info.name}' is broken: {what}")
        known = [own for kind, own in self._methods if kind == stage]
        message = f"no method '{name}' for stage {stage}{nearest(name, known)}"
        elsewhere = [kind for kind, own in self._methods if own == name]
        if elsewhere:
            message += f"; '{name}' is a method of stage {', '.join(sorted(elsewhere))}"
        if not known:
            message += "; no plugin brings one"
        for info in self._plugins:
            if "" in info.broken:
                message += f"; plugin '{info.name}' could not be loaded: {info.broken['']}"
        raise UserError(message)

    def plugin_of(self, method: Method) -> PluginInfo:
        """Returns the plugin that brought a method."""
        return self._owners[method.stage, method.name]

    def replaced(self, method: Method) -> Registry:
        """Returns the same plugins with another object in a method's place (`mctk.testing`).

        Args:
            method: Does the work of the registered method of its stage and name.
        """
        found = copy.copy(self)
        found._methods = {**self._methods, (method.stage, method.name): method}
        return found

    def register_kinds(self) -> None:
        """Makes the plugins' kinds of term known to `mctk.terms`; loads torch."""
        from mctk.terms import register_kind

        distributions = {info.name: info.distribution for info in self._plugins}
        for implementation in self.hook.kinds.get_hookimpls():
            name = implementation.plugin_name
            for kind in implementation.function():
                register_kind(kind, provider=distributions[name] or name)

    def _add_entry_points(self) -> None:
        found = sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name)
        selection = os.environ.get(SELECTION)
        if selection is not None:
            names = [name.strip() for name in selection.split(",") if name.strip()]
            installed = [point.name for point in found]
            for name in names:
                if name not in installed:
                    raise UserError(
                        f"{SELECTION} names '{name}', which is not installed"
                        + nearest(name, installed)
                    )
            found = [point for point in found if point.name in names]
        for point in found:
            owner = point.dist
            version, distribution = (owner.version, owner.name) if owner else ("", "")
            self._add(PluginInfo(point.name, version, distribution), point.load)

    def _add(self, info: PluginInfo, load: Callable[[], Any]) -> None:
        self._plugins.append(info)
        plugin = None
        try:
            plugin = load()
            _check_plugin(plugin)
            self._manager.register(plugin, info.name)
            for implementation in self.hook.methods.get_hookimpls():
                if implementation.plugin is plugin:
                    for method in implementation.function():
                        self._add_method(info, method)
        except (Exception, SystemExit) as error:  # whatever a stranger's import may raise
            _record(info, "", error)
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)

    def _add_method(self, info: PluginInfo, method: Any) -> None:
        stage, name = getattr(method, "stage", "?"), getattr(method, "name", "?")
        try:
            if (stage, name) in self._methods:
                owner = self._owners[stage, name]
                raise ValueError(f"plugin '{owner.name}' already brings {stage}/{name}")
            _check_method(method)
            self._manager.register(method, f"{stage}/{name}")
        except Exception as error:
            _record(info, f"{stage}/{name}", error)
            return
        self._methods[stage, name] = method
        self._owners[stage, name] = info
        info.methods.append(f"{stage}/{name}")


def load_plugins() -> Registry:
    """Returns a registry of the installed plugins; MCTK_PLUGINS="a,b" takes only those."""
    return Registry()


def _given(plugin: Any) -> Any:
    return plugin


def implements(method: Method, hook: str) -> bool:
    """Whether a method overrides a hook."""
    return hook in _METHOD_HOOKS and getattr(type(method), hook) is not getattr(Method, hook)


def _check_plugin(plugin: Any) -> None:
    """Refuses a hook without its marker: pluggy would pass over it in silence."""
    hooks = [name for name, value in vars(hookspecs.Plugin).items() if hasattr(value, "mctk_spec")]
    present = [name for name in hooks if callable(getattr(plugin, name, None))]
    for name in present:
        if not hasattr(getattr(plugin, name), "mctk_impl"):
            raise TypeError(f"hook {name}() is not marked with @hookimpl")
    if not present:
        raise TypeError(f"none of the hooks {', '.join(hooks)} is implemented")


def _check_method(method: Any) -> None:
    """Refuses what pluggy does not check: the class attributes and the arguments left out."""
    if not isinstance(method, Method):
        raise TypeError(f"methods() returned {method!r}, not an instance of mctk.hookspecs.Method")
    if getattr(method, "stage", None) not in STAGES:
        stage = getattr(method, "stage", None)
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    for attribute in ("name", "summary"):
        if not isinstance(getattr(method, attribute, None), str) or not getattr(method, attribute):
            raise ValueError(f"class attribute '{attribute}' is missing")
    options = method.Options
    if not (isinstance(options, type) and issubclass(options, MethodOptions)):
        raise TypeError("Options is not a subclass of mctk.hookspecs.MethodOptions")
    if options.model_config.get("extra") != "forbid":
        raise TypeError("Options must forbid extra fields, or misspelt options have no effect")
    for option, about in options.model_fields.items():
        if not about.description:
            raise TypeError(f"option '{option}' has no description")
    required = [method.stage]
    if method.takes_size:
        required += ["sizes"] + (["curve"] if method.units == "squared_error" else [])
    for hook in required:
        if not implements(method, hook):
            raise TypeError(f"hook {hook}() is not implemented")
    if method.scope != "bank" and method.stage == "decompose":
        raise TypeError(f"scope '{method.scope}' does not go with decompose")
    for hook, expected in _METHOD_HOOKS.items():
        given = tuple(inspect.signature(getattr(method, hook)).parameters)
        # pluggy names arguments that the spec has not, with the place of the definition; it lets
        # an implementation leave some out, but the engine passes all of them, in this order.
        if set(given) <= set(expected) and given != expected:
            raise TypeError(f"hook {hook}({', '.join(given)}) must take ({', '.join(expected)})")


def _record(info: PluginInfo, at: str, error: BaseException) -> None:
    text = " ".join(str(error).split())
    info.broken.setdefault(at, f"{type(error).__name__}: {text}" if text else type(error).__name__)
    info.traceback = info.traceback or "".join(traceback.format_exception(error))
