"""The kit's one call: a method through whole runs on tiny models, watched from all sides.

On each family a recipe with the method runs: planned, calibrated, compressed, written, held against
the plan and loaded again. Meanwhile every call of the method's hook is looked at (`calls`): it
changes none of its arguments, reads no statistic that it has not declared, gives the same when
called again, stores what `layout` and `sizes` said, keeps the layer at DENSE, makes the error that
its curve foretells, and does something with every option.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hookspecs import Method
from ..registry import Registry, load_plugins
from .calls import Finding, Watch
from .models import save_tiny
from .variants import variants

QUICK = ("mixtral", "gpt_oss")
TOO_LARGE = 10**9  # a setting that no method can mean


@dataclass
class Conformance:
    """What the kit found.

    Attributes:
        method: "stage/name".
        findings: What is wrong; empty if the method conforms.
        refused: Families that the method refuses, with its message.
        families: Families that it ran on.
        calls: How many calls of its hook were looked at.
    """

    method: str
    findings: list[Finding] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    calls: int = 0

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.calls} calls on {', '.join(self.families) or 'nothing'}"]
        lines += [f"  {finding}" for finding in self.findings]
        lines += [f"  refused on {family}: {why}" for family, why in self.refused.items()]
        return "\n".join(lines)


def assert_conforms(name: str, **settings: Any) -> Conformance:
    """Checks a method and raises with everything that was found; see `check_method`.

    Raises:
        AssertionError: The method does not conform.
    """
    found = check_method(name, **settings)
    if found.findings:
        raise AssertionError(str(found))
    return found


def check_method(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    before: Sequence[Mapping[str, Any]] = (),
    targets: str | list[str] = "experts.*",
    families: Iterable[str] = QUICK,
    without_effect: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> Conformance:
    """Tries a method on tiny models.

    Args:
        name: "stage/name".
        options: Options to start from; the method's defaults by default.
        values: By option, values to try: for those whose type suggests none, such as lists.
        before: Steps that the method wants before it, as recipes write them, such as
            [{"merge": "mean"}].
        targets: Banks that it works on.
        families: Tiny models to try it on; all of `mctk.testing.FAMILIES` are more thorough.
        without_effect: Options that cannot show an effect here, each with the reason.
        registry: Plugins; the installed ones by default.

    Returns:
        What was found.

    Raises:
        UserError: There is no such method or family.
    """
    registry = load_plugins() if registry is None else registry
    stage, _, own = name.partition("/")
    method = registry.method(stage, own)
    watch = Watch(variants(method.Options, options or {}, values))
    found = Conformance(name)
    if stage == "allocate":
        from .allocators import check_allocator

        check_allocator(method, method.Options(**(options or {})), watch)
        found.families.append("made-up curves")
    else:
        step = {stage: own, "targets": targets, "options": dict(options or {})}
        registry = registry.replaced(watch.stand_in(method))
        for family in families:
            _on_family(family, method, [*before, step], registry, watch, found)
        if not found.families:
            watch.find("families", f"it runs on none of {', '.join(found.refused)}")
    found.calls = watch.calls
    found.findings = [*watch.findings, *_idle(watch, without_effect or {})]
    return found


def _idle(watch: Watch, excused: Mapping[str, str]) -> list[Finding]:
    """Options that changed nothing in any call, and excuses that are none."""
    if not watch.calls:
        return []
    idle = [option for option in watch.options if option not in watch.effective]
    found = [Finding("options", f"{o} changes nothing") for o in idle if o not in excused]
    return found + [
        Finding("options", f"{option} is excused and changes something")
        for option in excused
        if option in watch.effective
    ]


def _on_family(
    family: str,
    method: Method,
    steps: list[Mapping[str, Any]],
    registry: Registry,
    watch: Watch,
    found: Conformance,
) -> None:
    """Runs the method on one family, at every way of giving it a size."""
    from ..engine import run
    from ..recipe import load_recipe

    with tempfile.TemporaryDirectory(prefix="mctk-testing-") as place:
        directory = Path(place)
        save_tiny(family, directory / "model")
        for number, way in enumerate(_ways(method)):
            last = {**steps[-1], **({"size": way.size} if way.size is not None else {})}
            content = {
                "model": str(directory / "model"),
                "output": str(directory / f"run-{number}"),
                "calibration": {
                    "text": str(directory / "model" / "text.jsonl"),
                    "sequences": way.sequences,
                    "length": way.length,
                    "batch": 2,
                },
                "steps": [*steps[:-1], last],
                **({"budget": way.budget} if way.budget else {}),
            }
            try:
                recipe = load_recipe(content, registry=registry)
                [metrics] = run([recipe], registry, cache=directory / "cache", fresh_process=False)
            except UserError as error:
                if isinstance(error.__cause__, Exception) and not isinstance(
                    error.__cause__, UserError
                ):
                    watch.find("errors", f"on {family}: {error}")  # a crash, reported by the engine
                found.refused[family] = str(error)
                return
            _check_metrics(metrics, family, way.budget, watch)
        found.families.append(family)
        if method.takes_size:
            _check_refusal(steps, directory, registry, watch)


@dataclass(frozen=True)
class _Way:
    """One way of running a method: its size or budget, and how much text there is."""

    size: Any = None
    budget: dict[str, Any] | None = None
    sequences: int = 8
    length: int = 24


def _ways(method: Method) -> list[_Way]:
    """Sizes and budgets to run a method with; at last with so little text that experts lack it."""
    stated = {"keep": 0.75} if method.takes_size else None
    few = _Way(stated, sequences=1, length=9)
    if not method.takes_size:
        return [_Way(), few]
    auto = _Way("auto", {"remove": 0.3, "of": "targets"})
    ways = [_Way(stated), auto, few]
    return [_Way(), *ways] if method.takes_size == "optional" else ways


def _check_metrics(
    metrics: Mapping[str, Any], family: str, budget: Mapping[str, Any] | None, watch: Watch
) -> None:
    """A run's own record: what was written is what was planned, and it runs as it did."""
    if metrics["gate"]["streamed_equal"] is not True:
        watch.find("gate", f"on {family}: the written files give other logits")
    sizes = metrics["sizes"]
    for name, planned in sizes["planned"].items():
        attained = sizes["attained"][name]
        if attained > planned or (attained < planned and name not in sizes["at_most"]):
            watch.find("accounting", f"on {family}: {name} planned {planned}, attained {attained}")
    if budget and metrics["budget"]["attained"] > metrics["budget"]["allowed"]:
        watch.find("budget", f"on {family}: {metrics['budget']}")


def _check_refusal(
    steps: list[Mapping[str, Any]], directory: Path, registry: Registry, watch: Watch
) -> None:
    """A size that cannot be is refused by the plan, in words."""
    from ..planning import make_plan
    from ..recipe import load_recipe

    content = {
        "model": str(directory / "model"),
        "calibration": {"text": str(directory / "model" / "text.jsonl"), "sequences": 1,
                        "length": 8},
        "steps": [*steps[:-1], {**steps[-1], "size": {"rank": TOO_LARGE}}],
    }  # fmt: skip
    try:
        make_plan(load_recipe(content, registry=registry), registry, "cpu")
    except UserError:
        return
    except Exception as error:  # what a stranger's method may raise
        watch.find("errors", f"size {TOO_LARGE}: {type(error).__name__} instead of a UserError")
        return
    watch.find("errors", f"size {TOO_LARGE} is accepted by the plan")
