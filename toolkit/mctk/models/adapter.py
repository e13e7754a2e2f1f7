"""A decoder layer's weights as banks, and back: one adapter for every family.

Where the banks are is found by `sites`; here their weights go out as terms and come back, and
compressed banks are described as the modules that run them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..runtime import TermModule, gate_up_rows, is_expert_list, tensor_name
from ..terms import Bank, BankShape, Bias, Dense, Term
from .expert_list import stacked
from .sites import BankSite, bank_sites


def read_banks(layer: nn.Module, index: int) -> dict[str, Bank]:
    """Reads a filled layer's banks as terms; original weights are views, not copies.

    Weights of a list of experts are moved so that they are views of one bank (`stacked`).

    Args:
        layer: The decoder layer, its weights loaded.
        index: Its number.

    Returns:
        Bank name → bank, one `Dense` (and a `Bias`) each, or a compressed module's own terms.
    """
    modules = dict(layer.named_modules())
    banks = {}
    for name, site in bank_sites(layer).items():
        module = modules[site.module]
        if isinstance(module, TermModule):
            terms = module.terms(site.part)
        elif site.part == "linear":
            terms = _linear_terms(module)
        else:
            terms = _expert_terms(module, site)
        banks[name] = Bank(name, index, site.shape, terms, site.groups)
    return banks


def _linear_terms(module: nn.Linear) -> list[Term]:
    shape = BankShape(1, module.out_features, module.in_features)
    terms: list[Term] = [Dense(shape, [0], module.weight.detach()[None])]
    if module.bias is not None:
        terms.append(Bias(shape, [0], module.bias.detach()[None]))
    return terms


def _expert_terms(module: nn.Module, site: BankSite) -> list[Term]:
    weight, bias = unfused(module, site.part)
    slots = range(site.shape.members)
    terms: list[Term] = [Dense(site.shape, slots, weight)]
    if bias is not None:
        terms.append(Bias(site.shape, slots, bias))
    return terms


def unfused(module: nn.Module, part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [E, out, in] and bias [E, out] of one part, as views of what the module holds."""
    if isinstance(module, nn.ModuleList):
        matrices = stacked(module, part)
        assert matrices is not None
        return matrices, stacked(module, part, "bias")
    name = "down_proj" if part == "down" else "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name).detach()
    bias = getattr(module, name + "_bias").detach() if module.has_bias else None
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    if name == "gate_up_proj":
        rows = gate_up_rows(module, part, weight.shape[1] // 2)
        weight = weight[:, rows]
        bias = bias[:, rows] if bias is not None else None
    return weight, bias


def write_banks(layer: nn.Module, banks: Mapping[str, Bank]) -> None:
    """Writes banks back into a layer's original modules, terms multiplied out.

    The inverse of `read_banks` for a layer of original modules: shapes are unchanged, so whatever
    the terms are, the layer stays ordinary. A member without a weight or bias gets zeros.

    Raises:
        ValueError: A bank has a bias and the original module has none.
    """
    modules = dict(layer.named_modules())
    for name, site in bank_sites(layer).items():
        if name not in banks:
            continue
        bank, module = banks[name], modules[site.module]
        if site.part == "linear":
            weights = module.weight.detach()[None]
            biases = module.bias.detach()[None] if module.bias is not None else None
        else:
            weights, biases = unfused(module, site.part)
        for member in range(bank.shape.members):
            weight, bias = bank.materialise(member)
            if bias is not None and biases is None:
                raise ValueError(f"{name}: has a bias, but {type(module).__name__} has none")
            _put(weights[member], weight)
            if biases is not None:
                _put(biases[member], bias)


def _put(place: torch.Tensor, value: torch.Tensor | None) -> None:
    if value is None:
        place.zero_()
    else:
        place.copy_(value)


def module_specs(layer: nn.Module, banks: Mapping[str, Bank]) -> dict[str, dict]:
    """Describes the modules of a layer that hold changed banks, as `runtime.swap` takes them.

    An experts module is described whole: its untouched banks are stored as the terms they are.

    Args:
        layer: The decoder layer (original modules).
        banks: All banks of each module that is to be swapped.

    Returns:
        Module path within the layer → {"type": "experts"|"expert_list"|"linear", "terms": specs}.
    """
    described: dict[str, dict] = {}
    for name, site in bank_sites(layer).items():
        if name not in banks:
            continue
        specs = [term.spec() for term in banks[name].terms]
        if site.part == "linear":
            described[site.module] = {"type": "linear", "terms": specs}
        else:
            listed = is_expert_list(layer.get_submodule(site.module))
            kind = "expert_list" if listed else "experts"
            entry = described.setdefault(site.module, {"type": kind, "terms": {}})
            entry["terms"][site.part] = specs
    return described


def module_tensors(layer: nn.Module, banks: Mapping[str, Bank]) -> dict[str, torch.Tensor]:
    """The tensors of the swapped modules by their names within the layer."""
    return {
        f"{site.module}.{tensor_name(site.part, i, key)}": tensor
        for name, site in bank_sites(layer).items()
        if name in banks
        for i, term in enumerate(banks[name].terms)
        for key, tensor in term.stored().items()
    }
