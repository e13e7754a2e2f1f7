"""Finds plugins, checks them, and hands out the methods that a recipe names.

A plugin that cannot be loaded, or a method that does not fit its hooks, is recorded with its
traceback and never stops a command that does not name it. Each `Registry` has its own plugin
manager, so two of them live side by side in one process.
"""

from __future__ import annotations

import contextlib
import copy
import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import pluggy

from mctk import hookspecs
from mctk.contract import check_method, check_plugin, checked_spec, implements
from mctk.errors import MethodError, UserError, brief, nearest
from mctk.hookspecs import STAGES, Method

GROUP = "mctk"
OWN = "mctk"  # the distribution whose plugins these are that come with mctk
SELECTION = "MCTK_PLUGINS"


@dataclass
class PluginInfo:
    """A plugin as found: what it brings, or why it cannot be used.

    Attributes:
        name: Name of its entry point.
        version: Version of the distribution that provides it ("" for one given in code).
        distribution: That distribution's name ("" for one given in code).
        spec: The version of the hook specifications that it was written for, if it says so.
        methods: "stage/name" of every method that may be used.
        broken: "stage/name" of a method, or "" for the whole plugin, to what is wrong with it.
        traceback: Where the first of these came from, for `mctk plugins --debug`.
    """

    name: str
    version: str = ""
    distribution: str = ""
    spec: int | None = None
    methods: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    traceback: str = ""

    @property
    def error(self) -> str | None:
        """Everything that is wrong with the plugin in one line, or None."""
        lines = [f"{at}: {what}" if at else what for at, what in self.broken.items()]
        return "; ".join(lines) or None

    def __str__(self) -> str:
        release = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"plugin '{self.name}'{release}"


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

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Calls a hook of all plugins, such as `registry.call("run_started", run=run)`.

        Returns:
            What each of them returned, but None.

        Raises:
            MethodError: One has failed; the message names it and says how to go on without it.
        """
        found = []
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            info = self._named(implementation.plugin_name)
            given = {name: arguments[name] for name in implementation.argnames}
            with _blaming(f"{info} failed in {hook}()", f"{SELECTION} can leave it out"):
                found.append(implementation.function(**given))
        return [result for result in found if result is not None]

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
                raise UserError(f"method {key} of {info} is broken: {info.broken[key]}")
        known = [own for kind, own in self._methods if kind == stage]
        message = f"no method '{name}' for stage {stage}{nearest(name, known)}"
        elsewhere = [kind for kind, own in self._methods if own == name]
        if elsewhere:
            message += f"; '{name}' is a method of stage {', '.join(sorted(elsewhere))}"
        if not known:
            message += "; no plugin brings one"
        for info in self._plugins:
            if "" in info.broken:
                message += f"; {info} could not be loaded: {info.broken['']}"
        if not elsewhere:
            message += "; mctk plugins lists what is installed, another plugin may bring it"
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

    def register_kinds(self, used: Collection[Method] = ()) -> None:
        """Makes the plugins' kinds of term known to `mctk.terms`; loads torch.

        Args:
            used: Methods that will be at work. Kinds of their plugins must be sound; those of
                others are left out and recorded as broken if they are not.

        Raises:
            MethodError: A plugin that is needed fails.
        """
        from mctk.terms import register_kind

        for implementation in self._manager.hook.kinds.get_hookimpls():
            info = self._named(implementation.plugin_name)
            try:
                with _blaming(f"{info} failed in kinds()"):
                    kinds: Any = implementation.function()
                    for kind in kinds:
                        register_kind(kind, provider=info.distribution or info.name)
            except UserError as error:
                if any(method.origin is info for method in used):
                    raise
                _record(info, "kinds()", error)

    def _named(self, name: str) -> PluginInfo:
        """The plugin that is registered under a name."""
        return next(info for info in self._plugins if info.name == name)

    def _add_entry_points(self) -> None:
        # Ours first: what a recipe means must not change because something else was installed.
        found = sorted(
            metadata.entry_points(group=GROUP),
            key=lambda point: (point.dist is None or point.dist.name != OWN, point.name),
        )
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
        known = [other for other in self._plugins if other.name == info.name]
        self._plugins.append(info)
        plugin, registered = None, False
        try:
            if known:
                raise ValueError(f"{known[0]} has that name already; uninstall one of the two")
            plugin = load()
            info.spec = checked_spec(plugin)
            check_plugin(plugin)
            self._manager.register(plugin, info.name)
            registered = True
            brought: list[Any] = []
            for implementation in self._manager.hook.methods.get_hookimpls():
                if implementation.plugin is plugin:
                    brought = _listed(implementation.function())
            for method in brought:
                self._add_method(info, method)
        except (Exception, SystemExit) as error:  # whatever a stranger's import may raise
            _record(info, "", error)
            if registered:
                self._manager.unregister(plugin)

    def _add_method(self, info: PluginInfo, method: Any) -> None:
        stage, name = getattr(method, "stage", "?"), getattr(method, "name", "?")
        try:
            if (stage, name) in self._methods:
                owner = self._owners[stage, name]
                raise ValueError(f"{owner} brings {stage}/{name} already; give it another name")
            check_method(method)
            self._manager.register(method, f"{stage}/{name}")
        except Exception as error:
            _record(info, f"{stage}/{name}", error)
            return
        method.origin = info
        self._methods[stage, name] = method
        self._owners[stage, name] = info
        info.methods.append(f"{stage}/{name}")


def load_plugins() -> Registry:
    """Returns a registry of the installed plugins; MCTK_PLUGINS="a,b" takes only those."""
    return Registry()


@contextlib.contextmanager
def calling(method: Method, hook: str, place: str = "") -> Iterator[None]:
    """What goes wrong in a method's hook names the method, its plugin and where it was at work.

    Args:
        method: The method.
        hook: The hook that is called.
        place: The banks and the layer, as in "experts.up of layer 3", if there is one.

    Raises:
        MethodError: In the place of whatever the hook raises that is no `UserError`.
    """
    where = f"{method.stage}/{method.name}" + (f" on {place}" if place else "")
    owner = f", {method.origin}" if method.origin else ""
    with _blaming(f"{where} failed", f"in {hook}() of version {method.version}{owner}"):
        yield


def place_of(banks: Mapping[str, Any]) -> str:
    """Banks of one layer for a message: "experts.gate, experts.up of layer 3"."""
    return f"{', '.join(banks)} of layer {next(iter(banks.values())).layer}"


@contextlib.contextmanager
def _blaming(what: str, more: str = "") -> Iterator[None]:
    """Turns what no user can mend into an error that says whose it is; it stays the cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a stranger's code may raise anything
        text = f"{type(error).__name__}: {brief(error)}"
        raise MethodError(f"{what}: {text}" + (f" ({more})" if more else "")) from error


def _given(plugin: Any) -> Any:
    return plugin


def _listed(brought: Any) -> list[Any]:
    """What methods() returned, whole or not at all: a generator may fail half-way."""
    if not isinstance(brought, Iterable):
        raise TypeError(f"methods() returned {brought!r}, not a list of methods")
    return list(brought)


def _record(info: PluginInfo, at: str, error: BaseException) -> None:
    text = " ".join(str(error).split())
    if not isinstance(error, UserError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    info.broken.setdefault(at, text)
    info.traceback = info.traceback or "".join(traceback.format_exception(error))
