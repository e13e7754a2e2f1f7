"""A plugin for tests: one method of several stages, with no mathematics."""

from typing import Literal

from mctk.hookspecs import Method, MethodOptions, hookimpl
from mctk.registry import Registry
from pydantic import Field


class TruncateOptions(MethodOptions):
    balance: bool = Field(False, description="share the singular values out")
    multiple: int = Field(8, ge=1, description="ranks are multiples of it")
    storage: Literal["plain", "pivoted"] = Field("plain", description="how factors are stored")


class Truncate(Method):
    stage = "decompose"
    name = "truncate"
    summary = "Cuts the smallest directions."
    reference = "https://example.org/truncate"
    version = 3
    Options = TruncateOptions
    takes_size = True

    def sizes(self, banks, options):
        (shape,) = [bank.shape for bank in banks.values()]
        return [8, -1], [8 * (shape.out_features + shape.in_features), 1 << 20]

    def curve(self, banks, statistics, options):
        return [1.0, 0.0]

    def decompose(self, bank, statistics, size, options):
        return []


class Score(Truncate):
    name = "score"
    units = "score"


class Drop(Method):
    stage = "prune"
    name = "drop"
    summary = "Drops experts, one layer after the other."
    scope = "layer"
    propagate = "compressed"

    def prune(self, layer, statistics, size, options):
        return {}


class Uniform(Method):
    stage = "allocate"
    name = "uniform"
    summary = "The same share everywhere."

    def allocate(self, curves, budget, options):
        return {}


class Greedy(Uniform):
    name = "greedy"
    summary = "Buys the cheapest error first."
    needs_curves = True


class FakePlugin:
    def __init__(self, methods=None):
        given = methods is not None
        self.brings = methods if given else [Truncate(), Score(), Drop(), Uniform(), Greedy()]
        self.layers = []

    @hookimpl
    def methods(self):
        return self.brings

    @hookimpl
    def layer_done(self, run, layer):
        self.layers.append((run, layer))


def fake_registry(methods=None):
    return Registry({"fake": FakePlugin(methods)})
