"""The kit's one call: a method through whole runs on tiny models, watched from all sides."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import MethodError, UserError, brief, nearest
from ..hookspecs import Method
from ..registry import Registry, load_plugins
from .models import TEXT, no_progress_bar, save_tiny
from .variants import variants
from .watch import Finding, Watch, where

QUICK = ("mixtral", "gpt_oss")
TOO_LARGE = 10**6  # a setting that no method can mean on tiny models


@dataclass
class Conformance:
    """What the kit found.

    Attributes:
        method: "stage/name".
        findings: What is wrong; empty if the method conforms.
        refused: What the method refuses, such as a family, with its message.
        families: Families that it ran on.
        calls: How many calls of its hook were looked at.
    """

    method: str
    findings: list[Finding] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    calls: int = 0

    def __str__(self) -> str:
        kinds: dict[tuple[str, ...], list[Finding]] = {}
        for finding in self.findings:
            # Of a family's banks the first tells enough; options are each its own.
            one = () if finding.family else (finding.text,)
            kinds.setdefault((finding.check, finding.family, *one), []).append(finding)
        verdict = "does not conform" if kinds else "conforms"
        tried = f"{self.calls} calls on {', '.join(self.families) or 'nothing'}"
        lines = [f"{self.method} {verdict} ({tried})"]
        for alike in kinds.values():
            more = f" (and {len(alike) - 1} more like it)" if len(alike) > 1 else ""
            lines.append(f"  {alike[0]}{more}")
        lines += [f"  refused on {what}: {why}" for what, why in self.refused.items()]
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
    after: Sequence[Mapping[str, Any]] = (),
    targets: str | list[str] = "experts.*",
    families: Iterable[str] = QUICK,
    without_effect: Mapping[str, str] | None = None,
    registry: Registry | None = None,
    models: Path | None = None,
) -> Conformance:
    """Tries a method on tiny models; `mctk.testing` lists what is looked at.

    Args:
        name: "stage/name".
        options: Options to start from; the method's defaults by default.
        values: By option, values to try: for those whose type suggests none, such as lists.
        before: Steps that the method wants before it, as recipes write them, such as
            [{"merge": "mean"}].
        after: Steps that follow it; one with size auto brings a budget.
        targets: Banks that it works on.
        families: Tiny models to try it on; all of `mctk.testing.FAMILIES` are more thorough.
        without_effect: Options that cannot show an effect here, each with the reason.
        registry: Plugins, an allocator `uniform` among them; the installed ones by default.
        models: Where tiny models are kept from one call to the next; made anew by default.

    Returns:
        What was found.

    Raises:
        UserError: There is no such method, option or family.
    """
    registry = load_plugins() if registry is None else registry
    stage, _, own = name.partition("/")
    method = registry.method(stage, own)
    excused = without_effect or {}
    for option in excused:
        if option not in method.Options.model_fields:
            raise UserError(f"no option '{option}'{nearest(option, method.Options.model_fields)}")
    watch = Watch(variants(method.Options, options or {}, values))
    found = Conformance(name)
    if stage == "allocate":
        from .allocators import check_allocator

        check_allocator(method, method.Options(**(options or {})), watch)
        found.families.append("made-up curves")
    else:
        step = {stage: own, "targets": targets, "options": dict(options or {})}
        registry = registry.replaced(watch.stand_in(method))
        with _few_collections(), tempfile.TemporaryDirectory(prefix="mctk-testing-") as place:
            kept = Path(place) if models is None else models
            for family in families:
                watch.family = family
                watch.possible = {}
                directory = Path(place) / f"work-{family}"
                trial = _Trial(
                    kept / family, directory, (*before, step, *after), len(before), registry, watch
                )
                trial.on_family(method, found)
        watch.family = ""
        if not found.families and not watch.findings:
            watch.find("families", "it runs on none of them")
    found.calls = watch.calls
    found.findings = [*watch.findings, *_idle(watch, excused)]
    return found


def _idle(watch: Watch, excused: Mapping[str, str]) -> Iterator[Finding]:
    """Options that changed nothing in any call, and excuses that are none."""
    if not watch.calls:
        return
    for option in watch.options:
        if option not in watch.effective and option not in excused:
            tried = len(watch.options[option])
            hint = f"in {tried} other values" if tried else "no other value is known: give `values`"
            yield Finding("options", "", f"{option} changes nothing ({hint})")
    for option in excused:
        if option in watch.effective:
            yield Finding("options", "", f"{option} is excused and changes something")


@contextlib.contextmanager
def _few_collections() -> Iterator[None]:
    """Keeps what is there out of the garbage collector's way: it is called after every layer.

    Else it looks through all that torch and transformers hold, for half of the time that tiny
    models take.
    """
    thawed = gc.get_freeze_count() == 0  # else whoever froze will know when to thaw
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if thawed:
            gc.unfreeze()


@dataclass(frozen=True)
class _Way:
    """One way of running a method: its size or budget, and how much text there is."""

    name: str
    size: Any = None
    budget: dict[str, Any] | None = None
    sequences: int = 16
    length: int = 24


def _ways(method: Method, shared: bool) -> list[_Way]:
    """Sizes and budgets to run a method with; at last with so little text that experts lack it.

    Args:
        method: The method.
        shared: Whether another step's size is auto, which takes a budget.
    """
    budget = {"remove": 0.3, "of": "targets"}
    usual = budget if shared else None
    stated = {"keep": 0.75} if method.takes_size else None
    few = _Way("9 tokens", stated, usual, sequences=1, length=9)
    if not method.takes_size:
        return [_Way("no size", budget=usual), few]
    ways = [_Way("size auto", "auto", budget), _Way("keep 0.75", stated, usual), few]
    return [_Way("no size", budget=usual), *ways] if method.takes_size == "optional" else ways


@dataclass(frozen=True)
class _Trial:
    """A method on one tiny model.

    Attributes:
        model: The model's directory; made if it is not there.
        directory: Where runs and their statistics go.
        steps: The recipe's steps.
        place: Which of them is the method's.
        registry: The plugins, the watched method among them.
        watch: Where findings go.
    """

    model: Path
    directory: Path
    steps: tuple[Mapping[str, Any], ...]
    place: int
    registry: Registry
    watch: Watch

    def on_family(self, method: Method, found: Conformance) -> None:
        """Runs the method in every way of giving it a size, and holds each run to its plan."""
        family = self.model.name
        if not (self.model / TEXT).exists():
            save_tiny(family, self.model)
        for way in _ways(method, any(step.get("size") == "auto" for step in self.steps)):
            known = len(self.watch.findings)
            try:
                self._run(way)
            except UserError as error:
                if not self._crashed(way, error, method) and len(self.watch.findings) == known:
                    found.refused[f"{family}, {way.name}"] = str(error)
                continue
            except Exception as error:  # the gate, or what a stranger's method may raise
                if len(self.watch.findings) == known:
                    text = f"{way.name}: {type(error).__name__}: {brief(error)}"
                    self.watch.find("run", text)
                continue
            if family not in found.families:
                found.families.append(family)
        if method.takes_size:
            self._check_refusal(method)

    def _run(self, way: _Way) -> None:
        """One run, planned, compressed, written, loaded and held against its plan."""
        from ..engine import run
        from ..planning import make_plan

        output = self.directory / way.name.replace(" ", "-")
        recipe = self._recipe(way, output)
        if way.budget:
            plan = make_plan(recipe, self.registry, "cpu")
            own = [curve for curve in plan.curves if curve.item[0] == self.place]
            self.watch.possible |= {curve.item[1:]: curve.settings for curve in own}
        cache = self.directory / "cache"
        [metrics] = run([recipe], self.registry, cache=cache, fresh_process=False)
        if metrics["gate"]["streamed_equal"] is not True:
            self.watch.find("gate", f"{way.name}: the written files give other logits")
        self._check_loading(output)
        sizes = metrics["sizes"]
        for name, planned in sizes["planned"].items():
            attained = sizes["attained"][name]
            if attained > planned or (attained < planned and name not in sizes["at_most"]):
                text = f"{way.name}: {name} planned {planned}, attained {attained}"
                self.watch.find("accounting", text)
        budget = metrics["budget"] if way.budget else {"attained": 0, "allowed": 0}
        if budget["attained"] > budget["allowed"]:
            text = f"{way.name}: {budget['attained']} of {budget['allowed']} allowed"
            self.watch.find("budget", text)

    def _recipe(self, way: _Way, output: Path) -> Any:
        from ..recipe import load_recipe

        steps = [dict(step) for step in self.steps]
        if way.size is not None:
            steps[self.place]["size"] = way.size
        content = {
            "model": str(self.model),
            "output": str(output),
            "calibration": {
                "text": str(self.model / TEXT),
                "sequences": way.sequences,
                "length": way.length,
                "batch": 4,
            },
            "steps": steps,
            **({"budget": way.budget} if way.budget else {}),
        }
        return load_recipe(content, registry=self.registry)

    def _check_loading(self, output: Path) -> None:
        """What was written loads by transformers, and gives the logits of the passes."""
        from transformers import AutoModelForCausalLM

        from ..engine.gate import GateError
        from ..engine.probe import check_probe
        from ..engine.workspace import STATE

        with no_progress_bar():
            loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
        try:
            check_probe(loaded.eval(), output / STATE)
        except GateError as error:
            self.watch.find("gate", f"loaded by from_pretrained: {error}")

    def _check_refusal(self, method: Method) -> None:
        """A size that cannot be is refused by the plan, in words."""
        from ..planning import make_plan

        way = _Way(f"size {TOO_LARGE}", {"rank": TOO_LARGE})
        try:
            make_plan(self._recipe(way, self.directory / "none"), self.registry, "cpu")
        except UserError as error:
            self._crashed(way, error, method)
        else:
            self.watch.find("errors", f"{way.name} is accepted by the plan")

    def _crashed(self, way: _Way, error: UserError, method: Method) -> bool:
        """Whether a method's own exception is behind an error, which is a finding then."""
        if not isinstance(error, MethodError):
            return False
        place = where(error.__cause__ or error, method)
        self.watch.find("errors", f"{way.name}: {error} ({place})")
        return True
