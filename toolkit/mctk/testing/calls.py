"""One call of a method's hook, looked at from all sides.

What the engine asked is asked again, on the same banks and with the same statistics: once more, at
other sizes, with other options, and not at all (kept dense).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..contract import implements
from ..engine.prepared import on_meta
from ..errors import UserError
from ..hookspecs import Method, MethodOptions
from ..terms import DENSE, Bank, Term
from .measure import Recorded, digests, measure_needs, moment_of, squared_error, stored
from .watch import described

if TYPE_CHECKING:
    from ..hookspecs import Layer
    from ..statistics import Need
    from .watch import Watch

Terms = dict[str, list[Term]]
TOLERANCE = 0.05  # of a curve against the error that it foretells
ROUNDING = 1e-5  # of the largest error, or of what a bank puts out in all: less is float32's
SIZES = 3  # how many sizes are tried beside the one that the engine asks for
_SAME: Any = object()  # an argument as the engine gave it


class Call:
    """One call of the hook of a method's stage.

    Args:
        watch: Where findings go.
        method: The method.
        arguments: The hook's, as the engine gives them.
    """

    def __init__(self, watch: Watch, method: Method, arguments: tuple[Any, ...]) -> None:
        self.watch, self.method = watch, method
        names = list(inspect.signature(getattr(Method, method.stage)).parameters)[1:]
        self.arguments = dict(zip(names, arguments, strict=True))
        self.size: int | None = self.arguments.get("size")
        self.options: MethodOptions = self.arguments["options"]
        self.statistics = Recorded(self.arguments["statistics"])
        self.arguments["statistics"] = self.statistics
        self.banks: Layer = self._given("bank") or self._given("layer")
        self.layer = next(iter(self.banks.values())).layer
        self.place = f"{', '.join(self.banks)} of layer {self.layer}"
        self.before = self._digests()

    def result(self) -> Any:
        """What the method returns to the engine, once everything about it has been looked at."""
        try:
            result = self._call(self.size, self.options)
        finally:
            self._declared(self.options)
        terms = self._terms(result)
        if terms is None or not self._sound(terms) or not self._unchanged():
            return result
        again = self.ask("called again")
        if isinstance(again, dict) and digests(again) != digests(terms):
            self.find("determinism", "a second call with the same arguments gives others")
            return result
        try:
            self._as_laid_out(terms, self.size, self.options)
            self._sizes()
            self._curve()
            self._options(terms)
        except Exception as error:  # whatever a stranger's other hooks may raise
            self.find(
                "errors", f"asked for other sizes and options: {described(error, self.method)}"
            )
        self._unchanged()
        return result

    def find(self, check: str, text: str) -> None:
        """Notes something that is wrong with this call."""
        self.watch.find(check, f"{self.place}: {text}")

    def ask(
        self, doing: str, size: Any = _SAME, options: MethodOptions | None = None
    ) -> Terms | str | None:
        """Calls the hook with another size or other options.

        Args:
            doing: What is tried, for a finding.
            size: The size; the engine's if left out.
            options: The options; the recipe's if left out.

        Returns:
            Terms by bank; the message of a `UserError`; None after any other exception, or where
            the result is not of its stage's form, which is a finding.
        """
        chosen = self.options if options is None else options
        try:
            found = self._terms(self._call(self.size if size is _SAME else size, chosen))
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever a stranger's method may raise
            self.find("errors", f"{doing}: {described(error, self.method)}")
            return None
        finally:
            self._declared(chosen)
        return found if found is not None and self._sound(found) else None

    def _call(self, size: int | None, options: MethodOptions) -> Any:
        arguments = {**self.arguments, "options": options}
        if "size" in arguments:
            arguments["size"] = size
        self.statistics.asked.clear()
        return getattr(self.method, self.method.stage)(*arguments.values())

    def _given(self, name: str) -> dict[str, Bank]:
        """The banks of an argument by name."""
        given = self.arguments.get(name)
        return {given.name: given} if isinstance(given, Bank) else dict(given or {})

    def _digests(self) -> dict[str, dict[str, str]]:
        """Hashes of all banks of all arguments."""
        return {
            name: digests({bank.name: bank.terms for bank in self._given(name).values()})
            for name in ("bank", "layer", "original")
        }

    def _terms(self, result: Any) -> Terms | None:
        """A hook's result by bank; None, and a finding, if it is of another form."""
        if self.method.stage == "decompose":
            result = {next(iter(self.banks)): result}
        listed = isinstance(result, Mapping) and all(
            isinstance(terms, list | tuple) and all(isinstance(term, Term) for term in terms)
            for terms in result.values()
        )
        if not listed:
            form = "a list of terms" if self.method.stage == "decompose" else "terms by bank"
            self.find("shapes", f"{self.method.stage}() does not return {form}")
            return None
        return {name: list(terms) for name, terms in result.items()}

    def _sound(self, terms: Terms) -> bool:
        """Terms are of the given banks, of their shapes, and finite."""
        sound = True
        for name, listed in terms.items():
            if name not in self.banks:
                self.find("shapes", f"returns terms for {name}, which it was not given")
                sound = False
                continue
            for term in listed:
                if term.shape != self.banks[name].shape:
                    self.find("shapes", f"{name}: a {term.kind} term has {term.shape}")
                    sound = False
                floats = [t for t in term.tensors().values() if t.is_floating_point()]
                if not all(bool(tensor.isfinite().all()) for tensor in floats):
                    self.find("finite", f"{name}: NaN or infinity in a {term.kind} term")
                    sound = False
        return sound

    def _unchanged(self) -> bool:
        now = self._digests()
        changed = [name for name, before in self.before.items() if now[name] != before]
        for name in changed:
            self.find("arguments", f"{self.method.stage}() changes {name}")
        return not changed

    def _declared(self, options: MethodOptions) -> None:
        own = {self.statistics.same(need) for need in self._needs(options)}
        for need in dict.fromkeys(self.statistics.asked):
            if self.statistics.same(need) not in own:
                self.find("statistics", f"reads {need} and does not declare it in needs()")
        self.statistics.asked.clear()

    def _needs(self, options: MethodOptions) -> list[Need]:
        banks = self.banks.values()
        return [n for bank in banks for n in self.method.needs(bank.shape, bank.name, options)]

    def _as_laid_out(self, terms: Terms, size: int | None, options: MethodOptions) -> None:
        """A layout says what the returned terms store, under any options."""
        if not implements(self.method, "layout"):
            return
        planned = self.method.layout(on_meta(self.banks), size, options)
        if planned is None:
            return
        turned = _difference(options, self.options)
        at = "" if size is None else f" at size {size}"
        where = f"{at}{turned and f' with {turned}'}"
        if terms.keys() != planned.keys():
            self.find("layout", f"rewrites {sorted(terms)}{where}, layout() says {sorted(planned)}")
            return
        for name in terms:
            kinds, foretold = ([t.kind for t in listed[name]] for listed in (terms, planned))
            if kinds != foretold:
                self.find("layout", f"{name} becomes {kinds}{where}, layout() says {foretold}")
        # Data may decide which member stores how much, but not how much there is.
        made, said = stored(terms), stored(planned)
        if made != said:
            self.find(
                "layout",
                f"stores {made[0]} parameters in {made[1]} bytes{where}, layout() says "
                f"{said[0]} in {said[1]}",
            )

    def _sizes(self) -> None:
        """Sizes cost what they store; dense keeps the layer."""
        if not self.method.takes_size:
            return
        settings, costs = self.method.sizes(on_meta(self.banks), self.options)
        if len(settings) != len(costs) or sorted(costs[:-1]) != list(costs[:-1]):
            self.find("sizes", f"sizes() gives {settings} the costs {costs}: not ascending")
            return
        if not settings or settings[-1] != DENSE:
            self.find("sizes", f"the last of sizes() is not DENSE: {settings}")
            return
        original = {name: bank.terms for name, bank in self.banks.items()}
        dense = self.ask("at size DENSE", DENSE)
        if not isinstance(dense, dict):
            if dense is not None:
                self.find("identity", f"size DENSE is refused: {dense}")
        elif digests(self._after(dense)) != digests(original):
            self.find("identity", "at size DENSE the terms are not what they were")
        price = dict(zip(settings, costs, strict=True))
        worth = [s for s in self.watch.possible.get(self._item, ()) if s != DENSE and s in price]
        for size in worth[:: max(1, len(worth) // SIZES)]:
            made = self.ask(f"at size {size}", size)
            if not isinstance(made, dict):
                if made is not None:
                    self.find("sizes", f"{size}, one of sizes(), is refused: {made}")
                continue
            self._as_laid_out(made, size, self.options)
            saved = stored(original)[0] - stored(self._after(made))[0]
            if price[DENSE] - price[size] != saved:
                self.find(
                    "sizes",
                    f"size {size} costs {price[DENSE] - price[size]} parameters less than DENSE by "
                    f"sizes(), and stores {saved} less",
                )

    @property
    def _item(self) -> tuple[int, str]:
        return self.layer, "+".join(self.banks)

    def _after(self, made: Terms) -> Terms:
        """All terms of the banks with what the method made of them."""
        now = {name: list(bank.terms) for name, bank in self.banks.items()}
        adds = self.method.stage == "compensate"
        return now | {name: [*now[name], *t] if adds else t for name, t in made.items()}

    def _curve(self) -> None:
        """A curve falls to 0; where it is squared errors it is the error that is made."""
        if not (self.method.takes_size and implements(self.method, "curve")):
            return
        settings, _ = self.method.sizes(on_meta(self.banks), self.options)
        errors = list(self.method.curve(self.banks, self.statistics, self.options))
        self._declared(self.options)
        if len(errors) != len(settings):
            self.find("curve", f"has {len(errors)} errors for {len(settings)} sizes")
            return
        if not all(0 <= error < float("inf") for error in errors):
            self.find("curve", f"has negative or infinite errors: {errors}")
            return
        least = ROUNDING * max(errors)
        for (size, low), (more, high) in pairwise(zip(settings, errors, strict=True)):
            if high > low + least:
                self.find("curve", f"rises from {low:.4g} at {size} to {high:.4g} at {more}")
                break
        if settings[-1] == DENSE and errors[-1] > least:
            self.find("curve", f"is {errors[-1]:.4g} at DENSE, not 0")
        place = (len(settings) - 1) // 4
        if settings[place] == DENSE or not measure_needs(self.method, next(iter(self.banks))):
            return
        [bank] = self.banks.values()
        made = self.ask(f"at size {settings[place]}", settings[place])
        moment = self.statistics.unseen(moment_of(bank.name))
        measured = squared_error(bank, made[bank.name], moment) if isinstance(made, dict) else None
        if measured is None:
            return
        error, output = measured
        if abs(error - errors[place]) > TOLERANCE * error + ROUNDING * output:
            self.find(
                "curve",
                f"says {errors[place]:.4g} at size {settings[place]}; the squared error over the "
                f"tokens is {error:.4g}",
            )

    def _options(self, terms: Terms) -> None:
        """Every option changes something: what is asked for, what is stored, or what comes out."""
        idle = {n: o for n, o in self.watch.options.items() if n not in self.watch.effective}
        if not idle:
            return
        base = self._outcome(self.options, terms)
        for name, tried in idle.items():
            for options in tried:
                outcome = self._outcome(options)
                if outcome is not None and outcome != base:
                    self.watch.effective.add(name)
                    break

    def _outcome(self, options: MethodOptions, terms: Terms | None = None) -> Any:
        """What a method does with some options, as something that compares; None if it crashed."""
        own = [self.statistics.same(need) for need in self._needs(options)]
        if any(need not in self.statistics for need in own):
            return repr(own)  # it asks for more than was measured
        doing = f"with {_difference(options, self.options)}"
        sizes = curve = None
        try:
            if self.method.takes_size:
                sizes = self.method.sizes(on_meta(self.banks), options)
            made = self.ask(doing, options=options) if terms is None else terms
            if not isinstance(made, dict):
                return made
            if terms is None and (sizes is None or self.size in (None, *sizes[0])):
                self._as_laid_out(made, self.size, options)
            if self.method.takes_size and implements(self.method, "curve"):
                curve = list(self.method.curve(self.banks, self.statistics, options))
                self._declared(options)
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever a stranger's method may raise
            self.find("errors", f"{doing}: {described(error, self.method)}")
            return None
        return repr(own), sizes, digests(made), curve


def _difference(options: MethodOptions, other: MethodOptions) -> str:
    """In which options two differ, and the first's values."""
    names = type(options).model_fields
    differing = [name for name in names if getattr(options, name) != getattr(other, name)]
    return ", ".join(f"{name}: {getattr(options, name)}" for name in differing)
