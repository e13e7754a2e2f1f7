"""Methods for tests that remove experts, by a seed and without statistics."""

from __future__ import annotations

import torch
from mctk.hookspecs import Method, MethodOptions, hookimpl
from mctk.registry import Registry, load_plugins
from mctk.terms import DENSE, drop_members
from pydantic import Field


class RemoveOptions(MethodOptions):
    seed: int = Field(0, description="which experts go")
    last: bool = Field(False, description="the last experts go, whatever the router's groups")
    stretch: float = Field(1.0, description="multiplies what stays")


class Remove(Method):
    """Keeps so many experts of each layer, some of each of the router's groups."""

    stage = "prune"
    name = "remove"
    summary = "Removes experts at random."
    scope = "layer"
    takes_size = True
    same_size = True
    Options = RemoveOptions

    def sizes(self, banks, options):
        first = next(iter(banks.values()))
        counts = list(range(first.groups, first.shape.members, first.groups))
        each = sum(bank.parameters() for bank in banks.values()) // first.shape.members
        return [*counts, DENSE], [*(each * n for n in counts), each * first.shape.members]

    def curve(self, banks, statistics, options):
        counts = self.sizes(banks, options)[0]
        members = next(iter(banks.values())).shape.members
        return [float(members - n) if n != DENSE else 0.0 for n in counts]

    def layout(self, banks, size, options):
        return self.prune(banks, None, size, options)

    def prune(self, layer, statistics, size, options):
        bank = next(iter(layer.values()))
        members, groups = bank.shape.members, bank.groups
        if size == DENSE:
            return {}
        generator = torch.Generator().manual_seed(options.seed + 100 * bank.layer)
        run = members // groups
        gone = [
            group * run + int(place)
            for group in range(groups)
            for place in torch.randperm(run, generator=generator)[: run - size // groups]
        ]
        if options.last:
            gone = list(range(size, members))
        found = {name: drop_members(bank, gone) for name, bank in layer.items()}
        if options.stretch != 1.0 and statistics is not None:
            for terms in found.values():
                terms[0] = terms[0].with_tensors({"weight": options.stretch * terms[0].weight})
        return found


class RemoveSome(Remove):
    """The same, each layer with a size of its own."""

    name = "remove_some"
    same_size = False


class _Plugin:
    @hookimpl
    def methods(self):
        return [Remove(), RemoveSome()]


def registry() -> Registry:
    """All installed methods, and these."""
    found = load_plugins()
    plugins = {"removal": _Plugin()}
    others = {info.name: info for info in found.plugins()}
    assert "removal" not in others
    added = Registry(plugins)
    found._methods |= added._methods
    found._owners |= added._owners
    return found
