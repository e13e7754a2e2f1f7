"""A stand-in for a method that lets the engine work and keeps what was found on the way."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import brief
from ..hookspecs import Method, MethodOptions

if TYPE_CHECKING:
    from ..statistics import Need


@dataclass(frozen=True)
class Finding:
    """Something that a method does and should not.

    Attributes:
        check: What was looked at; `mctk.testing` lists them.
        family: The tiny model that it was seen on ("" for what concerns all).
        text: What was found, with the bank, the layer and the numbers.
    """

    check: str
    family: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}{self.family and f' ({self.family})'}: {self.text}"


@dataclass
class Watch:
    """What was found while a method worked.

    Attributes:
        options: By option, other options to try (`variants`).
        family: The tiny model at hand.
        possible: By layer and banks (joined by +), the settings that a plan offers there.
        findings: What is wrong, each once.
        effective: Options that changed something in any call.
        calls: How often the hook of the method's stage was called.
    """

    options: Mapping[str, list[MethodOptions]]
    family: str = ""
    possible: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    findings: dict[Finding, None] = field(default_factory=dict)
    effective: set[str] = field(default_factory=set)
    calls: int = 0

    def find(self, check: str, text: str) -> None:
        """Notes something that is wrong."""
        self.findings[Finding(check, self.family, text)] = None

    def stand_in(self, method: Method) -> Method:
        """An object that does what the method does, watched.

        It asks for one statistic more where the method's curve can be held against it.
        """
        from .calls import Call
        from .measure import measure_needs

        watch = self

        def work(self: Any, *arguments: Any) -> Any:
            watch.calls += 1
            return Call(watch, method, arguments).result()

        def needs(self: Any, shape: Any, bank: str, options: Any) -> list[Need]:
            return [*method.needs(shape, bank, options), *measure_needs(method, bank)]

        hooks = {"needs": needs, method.stage: work}
        stand_in = copy.copy(method)
        stand_in.__class__ = type(type(method).__name__, (type(method),), hooks)
        return stand_in


def described(error: BaseException, method: Method) -> str:
    """An exception in words: its type, its text, and where."""
    return f"{type(error).__name__}: {brief(error)} ({where(error, method)})"


def where(error: BaseException, method: Method) -> str:
    """The last line of the method's own file that an exception passed, else where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = inspect.getsourcefile(type(method))
    place = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{place.filename}:{place.lineno}"
