"""A layer as it will run once its changed banks are loaded: terms in place, experts removed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..runtime import NUMBERS, is_expert_list, join, linears, swap
from ..terms import Bank, Bias, Dense, compact, removed_members
from .adapter import module_specs, unfused
from .routing import RouterSite, clone, fewer_experts, find_router, router_of
from .sites import bank_sites


def keeps_form(banks: Iterable[Bank]) -> bool:
    """Whether experts are what they were, only fewer: a matrix of its own for each that stays.

    Such experts are stored as the original's are, and need no terms.

    Args:
        banks: All of a layer's experts banks; others are passed over.
    """
    experts = [bank for bank in banks if bank.name.startswith("experts.")]
    gone = removed_members(experts)
    return bool(gone) and all(_own_matrices(bank, gone) for bank in experts)


def _own_matrices(bank: Bank, gone: tuple[int, ...]) -> bool:
    kinds = [type(term) for term in bank.terms]
    if kinds not in ([Dense], [Dense, Bias]):
        return False
    stay = bank.shape.members - len(gone)
    return all(
        term.rows is None
        and term.cols is None
        and set(term.stored()) == set(term.tensors())  # nothing is packed
        and len({slot for slot in term.slots if slot is not None}) == stay
        for term in bank.terms
    )


@contextlib.contextmanager
def installed(
    layer: nn.Module, banks: Mapping[str, Bank], dtype: torch.dtype, keep_form: bool = False
) -> Iterator[nn.Module]:
    """The layer as it will run once these banks are loaded; all is as it was afterwards.

    Experts that no term serves are gone from the router as well.

    Args:
        layer: A filled layer of original modules.
        banks: All banks of each module that is to be replaced.
        dtype: Compute dtype; terms are cast to it.
        keep_form: Whether experts run as the original's modules, only fewer, if they keep that
            form (`keeps_form`): as files that hold them so will be run.
    """
    sites = bank_sites(layer)
    gone = removed_members(banks.values())
    router: RouterSite | None = None
    kept: list[int] = []
    originals: dict[str, nn.Module] = {}
    device = next(layer.parameters()).device
    with contextlib.ExitStack() as stack:
        stack.callback(_put_back, layer, originals)
        if gone:
            router = find_router(layer, sites)
            assert router is not None
            kept = [number for number in range(router.experts) if number not in gone]
            stack.enter_context(router_of(layer.get_submodule, router, kept))
            originals[router.module] = layer.get_submodule(router.module)
            as_modules = keep_form and keeps_form(banks.values())
            rest = {n: bank for n, bank in banks.items() if sites[n].part == "linear"}
            experts = {n: compact(bank, kept) for n, bank in banks.items() if n not in rest}
            fewer = fewer_experts(layer, router, kept)
            if as_modules:
                parts = {sites[name].part: bank for name, bank in experts.items()}
                fewer = _filled(fewer, parts, next(originals[router.module].parameters()))
            banks = rest if as_modules else rest | experts
            layer.set_submodule(router.module, fewer)
            if is_expert_list(fewer):
                join(layer.get_submodule(router.block), fewer)
        specs = module_specs(layer, banks)
        for path in specs:
            originals.setdefault(path, layer.get_submodule(path))
        swap(layer, specs)
        for name, bank in banks.items():
            module = layer.get_submodule(sites[name].module)
            module.set_terms(sites[name].part, [t.to(dtype, device) for t in bank.terms])
        if router is not None:
            setattr(layer.get_submodule(router.module), NUMBERS, kept)
        yield layer


def _put_back(layer: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    for path, original in originals.items():
        layer.set_submodule(path, original)


def _filled(module: nn.Module, banks: Mapping[str, Bank], like: torch.Tensor) -> nn.Module:
    """Experts of the original's class around the banks' matrices.

    Args:
        module: A module of as many experts as the banks have members; not changed.
        banks: "gate", "up", "down" → its bank.
        like: A tensor of the dtype and on the device wanted.
    """
    if isinstance(module, nn.ModuleList):
        return _filled_list(module, banks, like)
    filled = clone(module)
    for name, tensor in module.named_parameters(recurse=False):
        empty = torch.empty(tensor.shape, dtype=like.dtype, device=like.device)
        filled._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for part, bank in banks.items():
        weights, biases = unfused(filled, part)
        for member in range(bank.shape.members):
            weight, bias = bank.materialise(member)
            assert weight is not None
            weights[member].copy_(weight)
            if biases is not None and bias is not None:
                biases[member].copy_(bias)
    return filled


def _filled_list(
    module: nn.ModuleList, banks: Mapping[str, Bank], like: torch.Tensor
) -> nn.ModuleList:
    experts = []
    for member, original in enumerate(module):
        expert = clone(original)
        layers = linears(original)
        assert layers is not None
        for name, child in original.named_children():
            part = next((part for part, layer in layers.items() if layer is child), None)
            if part is None:
                continue
            expert._modules[name] = clone(child)
            for key, tensor in zip(
                ("weight", "bias"), banks[part].materialise(member), strict=True
            ):
                if tensor is not None:
                    value = nn.Parameter(tensor.to(like), requires_grad=False)
                    expert._modules[name]._parameters[key] = value  # type: ignore[union-attr]
        experts.append(expert)
    return nn.ModuleList(experts).train(module.training)
