"""What a model stores and computes, counted from headers and terms (DESIGN §8).

Parameters are stored weight elements, tied tensors once; bytes are tensor payload, positions
included; active parameters are those that one token passes through; multiply-adds are those of the
weight matrices (attention scores, norms and activations are left out).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..models import BankSite, bank_sites, is_experts, own_tensors
from ..terms import Bias, Dense, Term
from .source import FLOATING, Source
from .weights import WeightMap

# What configurations call the experts per token.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelSizes:
    """The size of a model, original or compressed.

    Attributes:
        parameters: Stored weight elements.
        active_parameters: Those that a token passes through; embeddings whole.
        bytes: Tensor payload.
        macs_per_token: Multiply-adds of the weight matrices for one token.
        expert_parameters: Stored weight elements of routed experts.
    """

    parameters: int
    active_parameters: int
    bytes: int
    macs_per_token: int
    expert_parameters: int

    def as_dict(self) -> dict[str, int]:
        """The five numbers by name."""
        return asdict(self)


def experts_per_token(config: Any) -> int:
    """Experts per token (k) by the configuration; 1 for a dense model.

    Raises:
        UserError: The model has experts, and its configuration does not say how many a token uses.
    """
    text = config.get_text_config()
    parts = (text, getattr(text, "ffn_config", None))
    for value in (getattr(part, name, None) for part in parts for name in TOP_K_NAMES):
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]  # one entry a layer
        if isinstance(value, int) and value > 0:
            return value
    for name in COUNT_NAMES:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 1:
            raise UserError(
                f"config.json: {name} is {getattr(text, name)}, but nothing says how many of them "
                f"a token uses (looked for {', '.join(TOP_K_NAMES)})"
            )
    return 1


def original_terms(site: BankSite, dtype: torch.dtype) -> list[Term]:
    """A bank's original terms on the meta device."""
    shape = site.shape
    slots = range(shape.members)
    weight = torch.empty(
        shape.members, shape.out_features, shape.in_features, dtype=dtype, device="meta"
    )
    terms: list[Term] = [Dense(shape, slots, weight)]
    if site.bias:
        vector = torch.empty(shape.members, shape.out_features, dtype=dtype, device="meta")
        terms.append(Bias(shape, slots, vector))
    return terms


def active_parameters(term: Term, k: int) -> int:
    """Stored elements of a term that one token meets when it visits k members.

    A slot that members share is met once, however many of them are visited. Each tensor counts by
    its own slots, its first dimension: one V of a low-rank term, shared by all, is met whole.
    """
    weights = [t for t in term.tensors().values() if t.is_floating_point() and t.numel()]
    return sum(t.numel() // t.shape[0] * min(k, t.shape[0]) for t in weights)


def macs(term: Term, k: int) -> int:
    """Multiply-adds of a term for a token that visits k members (mean over members)."""
    members = term.shape.members
    return k * sum(term.macs(member) for member in range(members)) // members


def count(
    source: Source,
    weights: WeightMap,
    layers: Iterable[nn.Module],
    layers_path: str,
    k: int,
    head_macs: int,
    changed: Mapping[int, Mapping[str, list[Term]]],
) -> ModelSizes:
    """Counts a model whose changed modules hold terms.

    Args:
        source: The original's headers.
        weights: The original's weight map.
        layers: The decoder layers (meta is enough).
        layers_path: Their path in the model.
        k: Experts per token.
        head_macs: Multiply-adds of the head, V·H.
        changed: Layer → bank name → terms, all banks of each changed module; empty to count the
            original.
    """
    gone: set[str] = set()
    parameters = bytes_ = active = expert_parameters = multiply_adds = 0
    for index, layer in enumerate(layers):
        sites = bank_sites(layer)
        new = changed.get(index, {})
        for name, site in sites.items():
            routed = site.part != "linear"
            visits = k if routed else 1
            if name in new:
                module = f"{layers_path}.{index}.{site.module}"
                gone |= {f"{module}.{own}" for own in own_tensors(layer, site)}
                parameters += sum(term.parameters() for term in new[name])
                bytes_ += sum(term.nbytes() for term in new[name])
            terms = new[name] if name in new else terms_in(layer, site)
            multiply_adds += sum(macs(term, visits) for term in terms)
            if routed:
                expert_parameters += sum(term.parameters() for term in terms)
                active += sum(active_parameters(term, k) for term in terms)
        multiply_adds += _router_macs(layer, sites)
    for name, info in source.tensors.items():
        targets = weights.targets.get(name, ())
        if name in weights.tied or (targets and gone.issuperset(targets)):
            continue
        bytes_ += info.nbytes
        if info.dtype in FLOATING:
            parameters += info.numel
    active += parameters - expert_parameters
    return ModelSizes(parameters, active, bytes_, multiply_adds + head_macs, expert_parameters)


def terms_in(layer: nn.Module, site: BankSite) -> list[Term]:
    """A bank's terms as the (meta) layer holds them."""
    module = layer.get_submodule(site.module)
    if hasattr(module, "specs"):
        return module.terms(site.part) if site.part != "linear" else module.terms()
    dtype = next(module.parameters()).dtype
    return original_terms(site, dtype)


def _router_macs(layer: nn.Module, sites: Mapping[str, BankSite]) -> int:
    """Multiply-adds of the layer's matrices that are no bank: routers and their like."""
    banks = tuple(site.module + "." for site in sites.values())
    experts = tuple(path + "." for path, module in layer.named_modules() if is_experts(module))
    return sum(
        parameter.numel()
        for path, parameter in layer.named_parameters()
        if parameter.dim() == 2 and not path.startswith(banks + experts)
    )
