"""Statistics of a streamed model beside those that hooks take of the whole model in memory."""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from mctk.checkpoint import Source
from mctk.models import (
    bank_sites,
    find_layers,
    gradients_enabled,
    has_expert_list,
    language_part,
    read_banks,
)
from mctk.statistics import (
    ExpertFrequency,
    Fisher,
    GradientCollector,
    LayerCollector,
    Need,
    SecondMoment,
)
from mctk.sweep import (
    BackwardSweep,
    BackwardVisit,
    BoundaryStore,
    ForwardSweep,
    LayerVisit,
    StreamedModel,
)
from torch import nn

from .models import load, token_ids

SEQUENCES, LENGTH, BATCH = 4, 13, 2


def check_statistics(path: Path, directory: Path) -> None:
    """Moments of what enters every bank, tokens per expert, and the experts' Fisher information.

    Args:
        path: The model.
        directory: For what the backward sweep keeps.
    """
    model = StreamedModel(Source(path), trust_remote_code=True)
    ids = token_ids(SEQUENCES, LENGTH)
    sites = [bank_sites(layer) for layer in model.layers]
    batch = 1 if has_expert_list(model.model) else BATCH  # so the backward sweep wants it
    boundaries = BoundaryStore(directory / "boundaries", len(sites))
    values: dict[tuple[int, Need], torch.Tensor] = {}

    def forward(layer: LayerVisit) -> list[torch.Tensor]:
        own = sites[layer.index]
        needs: list[Need] = [ExpertFrequency()] if _experts(own) else []
        needs += {SecondMoment(name).canonical(own): None for name in own}
        collector = LayerCollector(
            layer.module,
            layer.index,
            own,
            read_banks(layer.module, layer.index),
            needs,
            model.device,
        )
        with collector.listening():
            outputs = [layer.run(b).cpu() for b in range(len(layer.inputs))]
        found = collector.result()
        for need in needs:
            value = found[need]
            values[layer.index, need] = value.value if isinstance(need, SecondMoment) else value
        return outputs

    def backward(layer: BackwardVisit) -> None:
        own = sites[layer.index]
        needs = [Fisher(name) for name in _experts(own)]
        collector = GradientCollector(layer.module, layer.index, own, needs, LENGTH, model.device)
        with collector.listening():
            layer.run()
        for need, value in collector.result().items() if needs else ():
            values[layer.index, need] = value

    ForwardSweep(model, ids, batch, boundaries=boundaries).run(forward)
    BackwardSweep(model, ids, batch, boundaries).run(backward)
    whole = load(path)
    layers = find_layers(whole)[1]
    _check_moments(whole, layers, ids, sites, values)
    _check_fisher(whole, ids, values)


def _experts(sites: dict[str, Any]) -> list[str]:
    return [name for name, site in sites.items() if site.part != "linear"]


def _check_moments(whole: nn.Module, layers: nn.ModuleList, ids, sites, values) -> None:
    """What enters linear layers, and who was chosen, by hooks on the model in memory."""
    inputs: dict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    chosen: dict[int, list[torch.Tensor]] = defaultdict(list)  # numbers of experts
    handles = []
    for index, layer in enumerate(layers):
        for site in sites[index].values():
            module = layer.get_submodule(site.module)
            if site.part == "linear":

                def tap(module, args, key=(index, site.name)):
                    inputs[key].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

                handles.append(module.register_forward_pre_hook(tap))
            elif site.part == "down" and isinstance(module, nn.ModuleList):
                for number, expert in enumerate(module):

                    def count(expert, args, key=index, number=number):
                        rows = args[0].reshape(-1, args[0].shape[-1]).shape[0]
                        chosen[key].append(torch.full((rows,), number))

                    handles.append(expert.register_forward_pre_hook(count))
            elif site.part == "down":

                def choice(module, args, kwargs, key=index):
                    found = [
                        x
                        for x in (*args, *kwargs.values())
                        if isinstance(x, torch.Tensor) and not x.is_floating_point()
                    ]
                    chosen[key].append(found[0].reshape(-1))

                handles.append(module.register_forward_pre_hook(choice, with_kwargs=True))
    with torch.no_grad():
        for batch in ids.split(BATCH):
            language_part(whole)[1](input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, own in enumerate(sites):
        for name, site in own.items():
            if site.part == "linear":
                rows = torch.cat(inputs[index, name])
                _assert_close(values[index, SecondMoment(name)][0], rows.T @ rows, index, name)
            elif site.part == "down":
                counts = torch.bincount(torch.cat(chosen[index]), minlength=site.shape.members)
                if not torch.equal(values[index, ExpertFrequency()], counts):
                    raise AssertionError(f"layer {index}: other tokens per expert than the model's")


def _check_fisher(whole: nn.Module, ids: torch.Tensor, values) -> None:
    """Mean squared gradients by a whole backward for each sequence."""
    if any(hasattr(module, "_apply_gate") for module in whole.modules()):
        whole.set_experts_implementation("eager")
    for parameter in whole.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    total = copy.deepcopy(whole).requires_grad_(False)
    for parameter in total.parameters():
        parameter.zero_()
    with contextlib.ExitStack() as stack:
        for layer in find_layers(whole)[1]:  # remote code may have switched gradients off
            stack.enter_context(gradients_enabled(layer))
        _add_squares(whole, ids, total)
    for index, layer in enumerate(find_layers(total)[1]):
        banks = read_banks(layer, index)  # squares stand where weights do: split like them
        for name in banks:
            if (index, Fisher(name)) in values:
                expected = banks[name].terms[0].weight
                _assert_close(values[index, Fisher(name)], expected, index, f"Fisher({name})")


def _add_squares(whole: nn.Module, ids: torch.Tensor, total: nn.Module) -> None:
    """Adds each sequence's squared gradients, divided by their number, to a model of zeros."""
    for tokens in ids:
        whole.zero_grad(set_to_none=True)
        logits = language_part(whole)[1](input_ids=tokens[None], use_cache=False).logits
        nn.functional.cross_entropy(logits[0, :-1].float(), tokens[1:]).backward()
        for sums, parameter in zip(total.parameters(), whole.parameters(), strict=True):
            if parameter.grad is not None:
                sums += parameter.grad.square() / len(ids)


def _assert_close(value: torch.Tensor, expected: torch.Tensor, layer: int, name: str) -> None:
    value, expected = value.double(), expected.double()
    if not (value - expected).norm() <= 1e-4 * expected.norm():
        raise AssertionError(f"layer {layer}, {name}: a statistic is not the whole model's")
