"""Watches a method at work in a run: every call of its stage's hook is looked at from all sides.

While the engine runs, the method is stood in for by a subclass of itself that calls the method and
then asks more of it, on the same banks and with the same statistics: once more, at other sizes,
with other options, and not at all (kept dense).
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..hookspecs import Method, MethodOptions
from ..registry import implements
from ..statistics import LayerStatistics, Need, SecondMoment
from ..terms import DENSE, Bank, Term

if TYPE_CHECKING:
    from ..hookspecs import Layer

Terms = dict[str, list[Term]]
TOLERANCE = 0.05  # of a curve against the error that it foretells


@dataclass(frozen=True)
class Finding:
    """Something that a method does and should not.

    Attributes:
        check: What was looked at.
        text: What was found.
    """

    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.check}: {self.text}"


class _Recorded(LayerStatistics):
    """Statistics that remember what was read of them."""

    def __init__(self, of: LayerStatistics) -> None:
        self.__dict__.update(of.__dict__)
        self.asked: set[Need] = set()

    def __getitem__(self, need: Need) -> Any:
        self.asked.add(need)
        return super().__getitem__(need)


@dataclass
class Watch:
    """What was found while a method worked.

    Attributes:
        options: By option, other options to try (`variants`).
        findings: What is wrong, each once.
        effective: Options that changed something in any call.
        calls: How often the method was called.
    """

    options: Mapping[str, list[MethodOptions]]
    findings: dict[Finding, None] = field(default_factory=dict)
    effective: set[str] = field(default_factory=set)
    calls: int = 0

    def stand_in(self, method: Method) -> Method:
        """An object that does what the method does, watched."""
        watch, kind = self, type(method)

        def work(self: Any, *arguments: Any) -> Any:
            return watch.call(method, *arguments)

        def needs(self: Any, shape: Any, bank: str, options: Any) -> list[Need]:
            # Beside what the method asks for, what its size curve is held against.
            own = list(method.needs(shape, bank, options))
            return [*own, SecondMoment(bank, "input")] if measurable(method) else own

        stand_in = copy.copy(method)
        stand_in.__class__ = type(kind.__name__, (kind,), {method.stage: work, "needs": needs})
        return stand_in

    def find(self, check: str, text: str) -> None:
        """Notes something that is wrong."""
        self.findings[Finding(check, text)] = None

    def call(self, method: Method, *arguments: Any) -> Any:
        """One call of the hook, and everything that is asked about it; returns its result."""
        call = _Call(self, method, arguments)
        result = call.first()
        self.calls += 1
        call.check(result)
        return result


def measurable(method: Method) -> bool:
    """Whether a method's curve is squared errors of single banks, which moments can measure."""
    one = method.scope == "bank" and method.units == "squared_error"
    return one and implements(method, "curve")


class _Call:
    """One call of a method's hook with its arguments."""

    def __init__(self, watch: Watch, method: Method, arguments: tuple[Any, ...]) -> None:
        self.watch, self.method = watch, method
        names = list(inspect.signature(getattr(Method, method.stage)).parameters)[1:]
        self.arguments = dict(zip(names, arguments, strict=True))
        self.size = self.arguments.get("size")
        self.options = self.arguments["options"]
        self.statistics = _Recorded(self.arguments["statistics"])
        given = self.arguments.get("layer", self.arguments.get("bank"))
        self.banks: Layer = {given.name: given} if isinstance(given, Bank) else dict(given or {})
        self.given = {name: self._digests(name) for name in ("bank", "layer", "original")}

    def work(self, size: int | str | None = "given", options: MethodOptions | None = None) -> Terms:
        """Calls the hook, with another size or other options if given; terms by bank name."""
        arguments = {**self.arguments, "statistics": self.statistics}
        if options is not None:
            arguments["options"] = options
        if size != "given":
            arguments["size"] = size
        found = getattr(self.method, self.method.stage)(*arguments.values())
        return {next(iter(self.banks)): list(found)} if isinstance(found, list) else dict(found)

    def first(self) -> Any:
        """Calls the hook as the engine does; its result as it is."""
        arguments = {**self.arguments, "statistics": self.statistics}
        return getattr(self.method, self.method.stage)(*arguments.values())

    def check(self, result: Any) -> None:
        """Looks at a result from all sides."""
        terms = self._terms(result)
        self._unchanged()
        self._declared()
        self._the_same_again(terms)
        self._as_laid_out(terms, self.size, self.options)
        self._sizes(terms)
        self._curve()
        self._options(terms)

    def _terms(self, result: Any) -> Terms:
        return {next(iter(self.banks)): result} if isinstance(result, list) else dict(result)

    def _unchanged(self) -> None:
        for name, before in self.given.items():
            if self._digests(name) != before:
                self.watch.find("arguments", f"{self.method.stage}() changes {name}")

    def _digests(self, name: str) -> dict[str, str]:
        """Hashes of the banks of one argument."""
        given = self.arguments.get(name)
        banks = {given.name: given} if isinstance(given, Bank) else (given or {})
        return {name: digest(bank.terms) for name, bank in banks.items()}

    def _declared(self) -> None:
        names = self.banks
        own = {
            need.canonical(names)
            for bank in self.banks.values()
            for need in self.method.needs(bank.shape, bank.name, self.options)
        }
        asked = {need.canonical(names) for need in self.statistics.asked}
        for need in sorted(asked - own, key=repr):
            self.watch.find("statistics", f"reads {need} and does not declare it in needs()")

    def _the_same_again(self, terms: Terms) -> None:
        if digest_all(self.work()) != digest_all(terms):
            self.watch.find("determinism", "a second call with the same arguments gives others")

    def _as_laid_out(self, terms: Terms, size: int | None, options: MethodOptions) -> None:
        """A layout says what the returned terms store."""
        if not implements(self.method, "layout"):
            return
        planned = self.method.layout(self._on_meta(), size, options)
        if planned is None:
            return
        if terms.keys() != planned.keys():
            self.watch.find(
                "layout", f"rewrites {sorted(terms)}, and layout() says {sorted(planned)}"
            )
            return
        for name in terms:
            kinds = [term.kind for term in terms[name]]
            if kinds != [term.kind for term in planned[name]]:
                self.watch.find("layout", f"{name} becomes {kinds}, layout() says otherwise")
        # Data may decide which member stores how much, but not how much there is.
        stored, foretold = _stored(terms), _stored(planned)
        if stored != foretold:
            self.watch.find(
                "layout",
                f"at size {size} stores {stored[0]} parameters in {stored[1]} bytes, layout() says "
                f"{foretold[0]} in {foretold[1]}",
            )

    def _sizes(self, terms: Terms) -> None:
        """Sizes cost what they store; dense keeps the layer; more is never stored for less."""
        if not self.method.takes_size:
            return
        settings, costs = self.method.sizes(self._on_meta(), self.options)
        if len(settings) != len(costs) or sorted(costs[:-1]) != list(costs[:-1]):
            self.watch.find("sizes", f"{len(settings)} settings with costs {costs}: not ascending")
            return
        if not settings or settings[-1] != DENSE:
            self.watch.find("sizes", "the last setting is not DENSE")
            return
        dense = self.work(size=DENSE)
        merged = {name: bank.terms for name, bank in self.banks.items()} | dense
        if digest_all(merged) != digest_all({n: b.terms for n, b in self.banks.items()}):
            self.watch.find("identity", "at size DENSE the banks are not what they were")
        # A plan leaves out what stores no less than dense.
        worth = [size for size, cost in zip(settings, costs, strict=True) if cost < costs[-1]]
        tried = worth[:: max(1, len(worth) // 3)]
        stored = {DENSE: _parameters(self.banks, {})}
        for size in tried:
            made = self.work(size=size)
            self._as_laid_out(made, size, self.options)
            stored[size] = _parameters(self.banks, made)
        price = dict(zip(settings, costs, strict=True))
        for size in tried:
            if price[DENSE] - price[size] != stored[DENSE] - stored[size]:
                self.watch.find(
                    "sizes",
                    f"size {size} costs {price[DENSE] - price[size]} parameters less than DENSE, "
                    f"and stores {stored[DENSE] - stored[size]} less",
                )

    def _curve(self) -> None:
        """A curve falls to 0; of squared errors it is the error that is made."""
        if not (self.method.takes_size and implements(self.method, "curve")):
            return
        settings, _ = self.method.sizes(self._on_meta(), self.options)
        errors = list(self.method.curve(self.banks, self.statistics, self.options))
        if len(errors) != len(settings):
            self.watch.find("curve", f"{len(errors)} errors for {len(settings)} sizes")
            return
        if any(low < high * (1 - 1e-9) for low, high in pairwise(errors)):
            self.watch.find("curve", f"rises with the size: {errors}")
        if errors and settings[-1] == DENSE and errors[-1] != 0:
            self.watch.find("curve", f"is {errors[-1]:g} at DENSE, not 0")
        if not measurable(self.method) or len(settings) < 2:
            return
        place = len(settings) // 4
        measured = self._measured(self.work(size=settings[place]))
        if measured is not None and abs(measured - errors[place]) > TOLERANCE * measured + 1e-6:
            self.watch.find(
                "curve",
                f"says {errors[place]:.4g} at size {settings[place]}; the squared error over the "
                f"tokens is {measured:.4g}",
            )

    def _measured(self, made: Terms) -> float | None:
        """The squared output error of new terms, over all tokens that reached the bank."""
        [(name, bank)] = self.banks.items()
        need = SecondMoment(name, "input")
        if need not in self.statistics:
            return None
        moment = LayerStatistics.__getitem__(self.statistics, need).value.double()
        after = Bank(name, bank.layer, bank.shape, made[name])
        total = 0.0
        for member in range(bank.shape.members):
            before, now = bank.materialise(member)[0], after.materialise(member)[0]
            if before is None:
                continue
            gone = (before - (torch.zeros_like(before) if now is None else now)).double()
            total += float((gone @ moment[member].to(gone.device) * gone).sum())
        return total

    def _options(self, terms: Terms) -> None:
        """Every option changes something: what is asked for, what is stored, or what comes out."""
        base = self._outcome(self.options, terms)
        for name, tried in self.watch.options.items():
            if name in self.watch.effective:
                continue
            value = getattr(self.options, name)
            for options in tried:
                if getattr(options, name) != value and self._outcome(options) != base:
                    self.watch.effective.add(name)
                    break

    def _outcome(self, options: MethodOptions, terms: Terms | None = None) -> Any:
        """What a method does with some options, as something that compares."""
        own = [
            need.canonical(self.banks)
            for bank in self.banks.values()
            for need in self.method.needs(bank.shape, bank.name, options)
        ]
        if any(need not in self.statistics for need in own):
            return own  # it asks for more than was measured
        try:
            sizes = self.method.sizes(self._on_meta(), options) if self.method.takes_size else None
            made = self.work(options=options) if terms is None else terms
            curve = None
            if self.method.takes_size and implements(self.method, "curve"):
                curve = list(self.method.curve(self.banks, self.statistics, options))
        except UserError as error:
            return str(error)
        return repr(own), sizes, digest_all(made), curve

    def _on_meta(self) -> dict[str, Bank]:
        """The banks as a plan shows them to a method."""
        found = {}
        for name, bank in self.banks.items():
            terms = [term.to(device=torch.device("meta")) for term in bank.terms]
            found[name] = Bank(name, bank.layer, bank.shape, terms, bank.groups)
        return found


def _stored(terms: Mapping[str, list[Term]]) -> tuple[int, int]:
    """Parameters and bytes of terms."""
    every = [term for listed in terms.values() for term in listed]
    return sum(term.parameters() for term in every), sum(term.nbytes() for term in every)


def digest(terms: list[Term]) -> str:
    """A hash of terms: their specs and all their numbers."""
    found = hashlib.sha256()
    for term in terms:
        found.update(repr(sorted(term.spec().items(), key=lambda item: item[0])).encode())
        for name, tensor in sorted(term.stored().items()):
            flat = tensor.detach().cpu().contiguous()
            found.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_all(terms: Mapping[str, list[Term]]) -> dict[str, str]:
    """Hashes by bank name."""
    return {name: digest(listed) for name, listed in terms.items()}


def _parameters(banks: Mapping[str, Bank], made: Terms) -> int:
    """Stored parameters of the banks with new terms in the place of old ones."""
    terms = {name: bank.terms for name, bank in banks.items()} | made
    return sum(term.parameters() for listed in terms.values() for term in listed)
