"""A tiny model, streamed and whole, and what a calibration of it gives."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path

import families
import torch
from mctk.checkpoint import Source
from mctk.engine.calibrate import cache_context, calibrate
from mctk.engine.progress import Reporter
from mctk.models import bank_sites
from mctk.statistics import (
    ChannelEnergy,
    ChannelMagnitude,
    ExpertFrequency,
    ExpertMeans,
    ExpertOutputs,
    LayerSamples,
    LayerStatistics,
    Need,
    RoutedOutputs,
    RouterLogits,
    RouterWeight,
    SecondMoment,
    StatisticsCache,
)
from mctk.sweep import StreamedModel
from mctk.terms import Bank
from torch import nn

SEQUENCES, LENGTH, BATCH = 5, 11, 2


def needs_of(sites: dict, samples: int = 20) -> list[Need]:
    """Everything that can be asked of a layer."""
    needs: list[Need] = []
    for name, site in sites.items():
        for side in ("input", "output"):
            needs += [SecondMoment(name, side), SecondMoment(name, side, pooled=True)]
        needs += [ChannelEnergy(name), ChannelMagnitude(name)]
        if site.part != "linear":
            needs.append(ChannelEnergy(name, weighted=True))
    unique = {need.canonical(sites) for need in needs}
    whole: list[Need] = [ExpertFrequency(), RouterWeight(), LayerSamples(samples)]
    if any(site.part == "down" for site in sites.values()):
        whole += [ExpertOutputs(), ExpertMeans(), RouterLogits(), RoutedOutputs(samples)]
    return [*whole, *sorted(unique, key=repr)]


class Bench:
    """One family, streamed and whole, and what a calibration of it gives."""

    def __init__(self, root: Path, family: str) -> None:
        self.whole = families.tiny(family)
        self.whole.save_pretrained(root / "model", max_shard_size="40KB")
        if family != "llama":
            self.whole.set_experts_implementation("mctk")
        self.model = StreamedModel(Source(root / "model"))
        self.ids = families.token_ids(SEQUENCES, LENGTH)
        self.sites = [bank_sites(layer) for layer in self.model.layers]
        self.needs = {i: needs_of(sites) for i, sites in enumerate(self.sites)}
        self.root = root

    def cache(self, **changes: object) -> StatisticsCache:
        context = {**cache_context(self.model, "f", "t", BATCH), **changes}
        return StatisticsCache(self.root / "cache", context)

    def calibrate(self, cache: StatisticsCache) -> int:
        state = self.root / "state"
        state.mkdir(exist_ok=True)
        reporter = Reporter(quiet=True)
        return calibrate(
            self.model, self.ids, BATCH, self.needs, self.sites, cache, state, reporter
        )

    def statistics(self, layer: int) -> LayerStatistics:
        values = {n: partial(self.cache().get, n, layer) for n in self.needs[layer]}
        return LayerStatistics(layer, values, self.sites[layer])


def recorded(bench: Bench) -> list[dict]:
    """Per layer: its inputs, every linear layer's inputs, and what reached the experts."""
    layers: list[dict] = [defaultdict(list) for _ in bench.sites]
    handles = []
    for layer, found in zip(bench.whole.model.layers, layers, strict=True):

        def entry(module, args, found=found):
            found["layer"].append(args[0])

        handles.append(layer.register_forward_pre_hook(entry))
        for path, module in layer.named_modules():

            def tap(module, args, found=found, path=path):
                found[path].append(args)

            if isinstance(module, torch.nn.Linear) or path.endswith("experts"):
                handles.append(module.register_forward_pre_hook(tap))
    with torch.no_grad():
        for ids in bench.ids.split(BATCH):
            bench.whole(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return layers


def activated(layer: nn.Module, banks: dict[str, Bank], e: int, x: torch.Tensor) -> torch.Tensor:
    """What enters down in an expert, [I], for one token [H]."""
    gate, gate_bias = banks["experts.gate"].materialise(e)
    up, up_bias = banks["experts.up"].materialise(e)
    gate = gate @ x + (0 if gate_bias is None else gate_bias)
    up = up @ x + (0 if up_bias is None else up_bias)
    experts = layer.get_submodule(experts_path(layer))
    if isinstance(experts, nn.ModuleList):
        return experts[e].act_fn(gate) * up
    parts = [gate, up]
    fused = torch.cat(parts) if experts.is_concatenated else torch.stack(parts, 1).reshape(-1)
    return experts._apply_gate(fused[None])[0]


def experts_path(layer: nn.Module) -> str | None:
    """Where a layer's experts are, if it has any."""
    return next((s.module for s in bank_sites(layer).values() if s.part == "down"), None)


def output(layer: nn.Module, banks: dict[str, Bank], e: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert gives, [H], for one token [H]."""
    weight, bias = banks["experts.down"].materialise(e)
    y = weight @ activated(layer, banks, e, x)
    return y if bias is None else y + bias


FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe", "llama"]
