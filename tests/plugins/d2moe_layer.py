"""A layer of tiny experts with a router, and its statistics as the engine would collect them."""

from __future__ import annotations

from dataclasses import replace

import torch
from mctk.statistics import (
    ChannelEnergy,
    ExpertFrequency,
    Fisher,
    LayerStatistics,
    Moment,
    RouterWeight,
    SecondMoment,
)
from mctk.terms import Bank, BankShape, Bias, Dense
from mctk_d2moe import methods

PARTS = ("gate", "up", "down")
NAMES = tuple(f"experts.{part}" for part in PARTS)


MERGES = {method.name: method for method in methods() if method.stage == "merge"}


def run(name, layer, statistics, size=None, **options):
    """What a merge makes of a layer."""
    method = MERGES[name]
    return method.merge(layer, statistics, size, method.Options(**options))


def base_of(terms, member, name="experts.up"):
    """A member's base ``[out, in]``."""
    return terms[name][0].materialise(member)[0]


def make_layer(experts=4, hidden=6, neurons=8, seed=0, bias=False, spread=None, parts=PARTS):
    """Banks of a layer; with `spread` every expert is a common one plus that much of its own."""
    generator = torch.Generator().manual_seed(seed)
    layer = {}
    for part in parts:
        size = (hidden, neurons) if part == "down" else (neurons, hidden)
        shape = BankShape(experts, *size)
        weight = torch.randn(experts, *size, generator=generator)
        if spread is not None:
            weight = torch.randn(1, *size, generator=generator) + spread * weight
        terms = [Dense(shape, range(experts), weight)]
        if bias:
            vector = torch.randn(experts, size[0], generator=generator)
            terms.append(Bias(shape, range(experts), vector))
        name = f"experts.{part}"
        layer[name] = Bank(name, 3, shape, terms)
    return layer


def with_weights(layer, change):
    """The same layer with every bank's weight ``[E, out, in]`` changed by a function of it."""
    result = {}
    for name, bank in layer.items():
        first, *rest = bank.terms
        term = Dense(bank.shape, first.slots, change(name, first.weight))
        result[name] = Bank(name, bank.layer, bank.shape, [term, *rest])
    return result


def after(layer, terms):
    """The layer with the banks that a step returned."""
    return {
        name: replace(bank, terms=list(terms.get(name, bank.terms))) for name, bank in layer.items()
    }


def on_meta(layer):
    return {
        name: replace(bank, terms=[t.to(device="meta") for t in bank.terms])
        for name, bank in layer.items()
    }


class Tokens:
    """Tokens ``x [T, H]``, and for each the experts that it reaches ``[T, E]`` with weights."""

    def __init__(self, experts=4, hidden=6, count=120, top=2, seed=1, shares=None):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(hidden, hidden, generator=generator)
        self.x = torch.randn(count, hidden, generator=generator) @ mix
        logits = torch.randn(count, experts, generator=generator)
        if shares is not None:
            logits = logits + torch.tensor(shares).log()
        best = logits.topk(top, dim=1)
        self.routing = torch.zeros(count, experts)
        self.routing.scatter_(1, best.indices, best.values.softmax(1))

    def of(self, expert):
        return self.x[self.routing[:, expert] > 0]


def activations(layer, x, expert):
    """What enters down of one expert, ``[T, I]``."""
    gate = layer["experts.gate"].apply(x, expert)
    return torch.nn.functional.silu(gate) * layer["experts.up"].apply(x, expert)


def output(layer, tokens):
    """The layer's output ``[T, H]``."""
    total = torch.zeros_like(tokens.x)
    for e in range(tokens.routing.shape[1]):
        h = activations(layer, tokens.x, e)
        total += tokens.routing[:, e : e + 1] * layer["experts.down"].apply(h, e)
    return total


def measure(layer, tokens, current=None, fisher_seed=5, channels=False):
    """All that the plugin may ask for; `current`: the layer as the steps before left it."""
    experts = tokens.routing.shape[1]
    values = {
        ExpertFrequency(): (tokens.routing > 0).sum(0),
        RouterWeight(): tokens.routing.double().sum(0),
    }
    generator = torch.Generator().manual_seed(fisher_seed)
    for of, present in (("original", layer), ("current", layer if current is None else current)):
        for name in present:
            inputs = [tokens.of(e) for e in range(experts)]
            if name == "experts.down":
                inputs = [activations(present, x, e) for e, x in enumerate(inputs)]
            values[SecondMoment(name, "input", of=of)] = _moment(inputs)
            values[SecondMoment(name, "input", of=of, pooled=True)] = _moment([torch.cat(inputs)])
            dense = max(
                (t for t in present[name].terms if isinstance(t, Dense)),
                key=lambda t: t.weight.shape[0],
                default=None,
            )
            if dense is not None and dense.cols is None and dense.rows is None:
                outputs = [x @ dense.materialise(e)[0].T for e, x in enumerate(inputs)]
                values[SecondMoment(name, "output", of=of)] = _moment(outputs)
        if channels:
            values |= _energies(present, tokens, of)
    for name, bank in layer.items():
        shape = (bank.shape.members, bank.shape.out_features, bank.shape.in_features)
        for labels in ("data", "model"):
            fisher = torch.rand(*shape, generator=generator)
            values[Fisher(name, labels=labels)] = fisher
    return LayerStatistics(3, values, set(layer))


def asked_for(method, layer, statistics, options):
    """Statistics without what a method did not declare, kept as the engine keeps them."""
    needs = [n for bank in layer.values() for n in method.needs(bank.shape, bank.name, options)]
    values = {need.canonical(layer): statistics[need] for need in needs}
    return LayerStatistics(3, values, set(layer))


def _moment(inputs):
    value = torch.stack([x.T @ x for x in inputs])
    return Moment(value, torch.tensor([len(x) for x in inputs]))


def _energies(layer, tokens, of):
    experts = tokens.routing.shape[1]
    own = [activations(layer, tokens.of(e), e).square().sum(0) for e in range(experts)]
    mixed = sum(
        tokens.routing[:, e : e + 1] * activations(layer, tokens.x, e) for e in range(experts)
    )
    return {
        ChannelEnergy("experts.down", of=of): torch.stack(own),
        ChannelEnergy("experts.down", weighted=True, of=of): mixed.square().sum(0)[None],
    }
