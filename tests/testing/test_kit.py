"""The kit finds what it should: methods that break one rule each, and one that breaks none."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Literal

import mctk_allocate
import pytest
import torch
from fake_plugin import FakePlugin
from mctk import decompose, testing
from mctk.decompose import LowRankOptions
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.registry import Registry
from mctk.statistics import ExpertFrequency, SecondMoment
from mctk.terms import DENSE
from mctk.testing import assert_conforms, check_method
from mctk.testing.variants import variants
from pydantic import Field

DRAWN = torch.Generator().manual_seed(0)


class Good(Method):
    """Truncated SVD by output error, as the shipped one does it, and no rule broken."""

    stage = "decompose"
    name = "toy"
    summary = "Cuts the least directions."
    Options = LowRankOptions
    takes_size = True

    def needs(self, shape, bank, options):
        return [SecondMoment(bank, "input")]

    def sizes(self, banks, options):
        return decompose.sizes(banks, options)

    def layout(self, banks, size, options):
        return decompose.layout(banks, size, options)

    def curve(self, banks, statistics, options):
        bank = decompose.only(banks)
        settings, _ = self.sizes(banks, options)
        total = [0.0] * len(settings)
        for part in self.parts(bank, statistics):
            errors = decompose.tail_errors(part.spectrum, settings)
            total = [sum(pair) for pair in zip(total, errors, strict=True)]
        return total

    def decompose(self, bank, statistics, size, options):
        dense = decompose.matrices(bank)
        return decompose.replace(bank, dense, self.parts(bank, statistics), size, options)

    def parts(self, bank, statistics):
        from mctk.linalg import metric_svd

        moments = statistics[SecondMoment(bank.name, "input")].value
        weights = decompose.matrices(bank).weight
        return (metric_svd(w, input_moment=m) for w, m in zip(weights, moments, strict=True))


class WrongShapes(Good):
    def decompose(self, bank, statistics, size, options):
        return None


class NotFinite(Good):
    def decompose(self, bank, statistics, size, options):
        return [
            term.with_tensors({n: t * float("inf") for n, t in term.tensors().items()})
            for term in super().decompose(bank, statistics, size, options)
        ]


class Mutates(Good):
    def decompose(self, bank, statistics, size, options):
        decompose.matrices(bank).weight[0] *= 1.5
        return super().decompose(bank, statistics, size, options)


class Random(Good):
    def decompose(self, bank, statistics, size, options):
        found = super().decompose(bank, statistics, size, options)
        noise = 1 + 1e-6 * torch.rand((), generator=DRAWN)
        return [term.with_tensors({n: t * noise for n, t in term.tensors().items()})
                for term in found]  # fmt: skip


class Undeclared(Good):
    def decompose(self, bank, statistics, size, options):
        # In the statistics, for the engine measures it for others; not among what it asked for.
        statistics.get(ExpertFrequency())
        return super().decompose(bank, statistics, size, options)


class Layout(Good):
    def layout(self, banks, size, options):
        return super().layout(banks, size if size == DENSE else size + 1, options)


class LayoutOfOptions(Good):
    """Its layout is right for the defaults, and knows nothing of storage."""

    def layout(self, banks, size, options):
        return super().layout(banks, size, LowRankOptions())


class WrongSizes(Good):
    def sizes(self, banks, options):
        settings, costs = super().sizes(banks, options)
        return settings, [*(cost - 7 for cost in costs[:-1]), costs[-1]]


class NotDense(Good):
    def decompose(self, bank, statistics, size, options):
        full = min(bank.shape.out_features, bank.shape.in_features)
        return super().decompose(bank, statistics, full if size == DENSE else size, options)


class WrongCurve(Good):
    def curve(self, banks, statistics, options):
        return [0.5 * error for error in super().curve(banks, statistics, options)]


class Rising(Good):
    units = "score"

    def curve(self, banks, statistics, options):
        first, second, *rest = super().curve(banks, statistics, options)
        return [second, first, *rest]


class IdleOptions(LowRankOptions):
    strength: float = Field(1.0, ge=0, description="does nothing")


class Idle(Good):
    Options = IdleOptions


class Crashes(Good):
    def decompose(self, bank, statistics, size, options):
        raise IndexError("out of bounds")


class CrashesWithOptions(Good):
    def decompose(self, bank, statistics, size, options):
        if options.storage == "pivoted":
            raise IndexError("out of bounds")
        return super().decompose(bank, statistics, size, options)


class Anything(Method):
    """Takes any size."""

    stage = "prune"
    name = "toy"
    summary = "Takes any size, and changes nothing."
    takes_size = True
    units = "score"

    def sizes(self, banks, options):
        total = sum(bank.parameters() for bank in banks.values())
        return [1, 2, DENSE], [total // 4, total // 2, total]

    def layout(self, banks, size, options):
        return {}

    def prune(self, layer, statistics, size, options):
        return {}


class Refuses(Anything):
    def layout(self, banks, size, options):
        raise UserError("no banks like these")


BROKEN = [
    (WrongShapes, "shapes", "does not return a list of terms"),
    (NotFinite, "finite", "NaN or infinity"),
    (Mutates, "arguments", "changes bank"),
    (Random, "determinism", "gives others"),
    (Undeclared, "statistics", "ExpertFrequency"),
    (Layout, "layout", "parameters"),
    (LayoutOfOptions, "layout", "with storage: pivoted"),
    (WrongSizes, "sizes", "less than DENSE"),
    (NotDense, "identity", "not what they were"),
    (WrongCurve, "curve", "the squared error over the tokens is"),
    (Rising, "curve", "rises from"),
    (Idle, "options", "strength changes nothing"),
    (Crashes, "errors", r"IndexError: out of bounds .*test_kit.py:\d+"),
    (CrashesWithOptions, "errors", "with storage: pivoted: IndexError"),
    (Anything, "errors", "size 1000000 is accepted by the plan"),
    (Anything, "sizes", "less than DENSE"),
    (Refuses, "families", "none of them"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def registry_of(method):
    return Registry({"allocate": mctk_allocate, "toys": FakePlugin([method])})


def check(kind, models):
    method = kind()
    return check_method(
        f"{method.stage}/toy",
        targets=["experts.up"],
        families=["mixtral"],
        registry=registry_of(method),
        models=models,
    )


def test_a_good_method_conforms(models):
    found = check(Good, models)
    assert not found.findings, str(found)
    assert found.families == ["mixtral"]
    assert found.calls == 6  # 2 layers, with a size in three ways
    assert str(found) == "decompose/toy conforms (6 calls on mixtral)"


@pytest.mark.parametrize(("kind", "named", "text"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_method_is_found_out(kind, named, text, models):
    found = check(kind, models)
    assert any(f.check == named and re.search(text, f.text) for f in found.findings), str(found)
    assert f"\n  {named}" in str(found)


def test_a_report_names_method_family_check_and_numbers(models):
    with pytest.raises(AssertionError) as raised:
        assert_conforms(
            "decompose/toy",
            targets=["experts.up"],
            families=["mixtral"],
            registry=registry_of(WrongSizes()),
            models=models,
        )
    first, second, *_ = str(raised.value).splitlines()
    assert first.startswith("decompose/toy does not conform (")
    assert second.startswith("  sizes (mixtral): experts.up of layer 0: size 8 costs ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": {"streng": [2]}}, r"no option 'streng' \(did you mean 'strength'\?\)"),
        ({"without_effect": {"streng": "no"}}, r"no option 'streng' \(did you mean 'strength'"),
        ({"options": {"streng": 2}}, "IdleOptions: .*streng Extra inputs are not permitted"),
        ({"values": {"strength": [2, -1]}}, "IdleOptions: .*strength Input should be greater"),
        ({"families": ["mixtrall"]}, r"no tiny model of 'mixtrall' \(did you mean 'mixtral'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_method("decompose/toy", registry=registry_of(Idle()), **settings)


def test_other_values_are_made_up_of_an_options_type():
    class Options(MethodOptions):
        count: int = Field(3, ge=1, le=4, description="bounded")
        kind: Literal["a", "b", "c"] = Field("b", description="one of some")
        share: float | None = Field(None, description="or none")
        names: list[str] = Field([], description="anything")

    found = variants(Options, {"kind": "c"}, {"names": [["x"]]})
    assert [options.kind for options in found["kind"]] == ["a", "b"]
    assert {options.count for options in found["count"]} == {1, 2, 4}
    assert None not in [options.share for options in found["share"]]
    assert {options.kind for options in found["share"]} == {"c"}
    assert [options.names for options in found["names"]] == [["x"]]


def test_an_excuse_is_taken_unless_the_option_does_something(models):
    settings = {"targets": ["experts.up"], "families": ["mixtral"], "models": models}
    excuse = {"strength": "is for larger models", "storage": "is not"}
    found = check_method(
        "decompose/toy", registry=registry_of(Idle()), without_effect=excuse, **settings
    )
    assert [str(f) for f in found.findings] == ["options: storage is excused and changes something"]


class EvenOptions(MethodOptions):
    later: bool = Field(False, description="later layers first")


class Even(Method):
    """One step more for each in turn."""

    stage = "allocate"
    name = "toy"
    summary = "One step more for each in turn."
    Options = EvenOptions

    def allocate(self, curves, budget, options):
        ordered = sorted(curves, key=lambda curve: curve.item, reverse=options.later)
        left = budget - sum(curve.cost[0] for curve in ordered)
        if left < 0:
            raise UserError("the budget is below the least")
        chosen = {curve.item: 0 for curve in ordered}
        for index in range(1, len(ordered[0].cost)):
            for curve in ordered:
                step = curve.cost[index] - curve.cost[index - 1]
                if step <= left:
                    chosen[curve.item], left = index, left - step
        return chosen


class Overspends(Even):
    def allocate(self, curves, budget, options):
        return super().allocate(curves, budget + 200, options)


class Saves(Even):
    def allocate(self, curves, budget, options):
        least = sum(curve.cost[0] for curve in curves)
        return super().allocate(curves, max(budget - 500, least), options)


class Ignores(Even):
    def allocate(self, curves, budget, options):
        return {curve.item: 0 for curve in curves}


class Misses(Even):
    def allocate(self, curves, budget, options):
        return super().allocate(curves[1:], budget, options)


class ReadsErrors(Even):
    def allocate(self, curves, budget, options):
        return super().allocate(sorted(curves, key=lambda c: c.error[0]), budget, options)


class Wavers(Even):
    calls = 0

    def allocate(self, curves, budget, options):
        self.calls += 1
        return super().allocate(curves, budget, EvenOptions(later=self.calls % 2 == 0))


class NoOptions(Even):
    def allocate(self, curves, budget, options):
        return super().allocate(curves, budget, EvenOptions())


@pytest.mark.parametrize(
    ("kind", "named", "text"),
    [
        (Overspends, "budget", "spends 2900 of 2700"),
        (Saves, "budget", "a step of 100 more can be had"),
        (Ignores, "budget", "a step of 100 more can be had"),
        (Ignores, "errors", "below the least of 600, is accepted"),
        (Misses, "allocation", "the setting None"),
        (ReadsErrors, "errors", "'NoneType' object is not subscriptable"),
        (Wavers, "determinism", "gives others"),
        (NoOptions, "options", "later changes nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_broken_allocator_is_found_out(kind, named, text):
    found = check_method("allocate/toy", registry=registry_of(kind()))
    assert any(f.check == named and text in f.text for f in found.findings), str(found)


def test_a_good_allocator_conforms():
    assert_conforms("allocate/toy", registry=registry_of(Even()))


def test_the_kit_does_without_pytest():
    folder = Path(testing.__file__).parent
    trees = [ast.parse(file.read_text()) for file in folder.glob("*.py")]
    names = {
        name
        for node in (node for tree in trees for node in ast.walk(tree))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else
            [node.module] if isinstance(node, ast.ImportFrom) else []
        )
        if name
    }  # fmt: skip
    assert "torch" in names
    assert not {"pytest", "tests"} & {name.partition(".")[0] for name in names}
