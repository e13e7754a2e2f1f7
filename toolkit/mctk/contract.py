"""What a plugin and its methods must have to be let in, beside what pluggy checks by itself."""

from __future__ import annotations

import inspect
from typing import Any

from mctk.errors import UserError
from mctk.hookspecs import OLDEST, SPEC, STAGES, Method, MethodOptions, Plugin

# In the order of the spec, `self` left out: overriding one of these implements it.
_METHOD_HOOKS = {
    name: tuple(inspect.signature(value).parameters)[1:]
    for name, value in vars(Method).items()
    if hasattr(value, "mctk_spec")
}
# What the class attributes may be that are choices.
_VALUES: dict[str, tuple[Any, ...]] = {
    "scope": ("bank", "layer", "experts"),
    "takes_size": (False, True, "optional"),
    "units": ("squared_error", "score"),
    "propagate": ("original", "compressed"),
}


def implements(method: Method, hook: str) -> bool:
    """Whether a method overrides a hook."""
    return hook in _METHOD_HOOKS and getattr(type(method), hook) is not getattr(Method, hook)


def checked_spec(plugin: Any) -> int | None:
    """The version of the hook specifications that a plugin was written for, if it says so."""
    found = getattr(plugin, "MCTK_SPEC", None)
    if found is None:
        return None
    if not isinstance(found, int):
        raise TypeError(f"MCTK_SPEC is {found!r}; write a number, such as {SPEC}")
    if found > SPEC:
        raise UserError(
            f"written for hook specifications {found}, and this mctk has {SPEC}: upgrade mctk"
        )
    if found < OLDEST:
        raise UserError(
            f"written for hook specifications {found}, and this mctk takes {OLDEST} to {SPEC}: "
            "upgrade the plugin (CHANGELOG.md says what its author has to change)"
        )
    return found


def check_plugin(plugin: Any) -> None:
    """Refuses a hook without its marker: pluggy would pass over it in silence."""
    hooks = [name for name, value in vars(Plugin).items() if hasattr(value, "mctk_spec")]
    present = [name for name in hooks if callable(getattr(plugin, name, None))]
    for name in present:
        if not hasattr(getattr(plugin, name), "mctk_impl"):
            raise TypeError(f"hook {name}() is not marked with @hookimpl")
    if not present:
        raise TypeError(f"none of the hooks {', '.join(hooks)} is implemented")


def check_method(method: Any) -> None:
    """Refuses what pluggy does not check: the class attributes and the arguments left out."""
    if not isinstance(method, Method):
        raise TypeError(f"methods() returned {method!r}, not an instance of mctk.hookspecs.Method")
    if getattr(method, "stage", None) not in STAGES:
        stage = getattr(method, "stage", None)
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    for attribute in ("name", "summary"):
        if not isinstance(getattr(method, attribute, None), str) or not getattr(method, attribute):
            raise ValueError(f"class attribute '{attribute}' is missing")
    for attribute, values in _VALUES.items():
        value = getattr(method, attribute)
        if value not in values:
            raise ValueError(f"class attribute {attribute} = {value!r} is none of {values}")
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
        for name in given:
            if name not in expected:  # with a default, pluggy would let it pass
                raise TypeError(f"hook {hook}(): argument {name} is not in the hook specification")
        # pluggy names arguments that the spec has not, with the place of the definition; it lets
        # an implementation leave some out, but the engine passes all of them, in this order.
        if set(given) <= set(expected) and given != expected:
            raise TypeError(f"hook {hook}({', '.join(given)}) must take ({', '.join(expected)})")
