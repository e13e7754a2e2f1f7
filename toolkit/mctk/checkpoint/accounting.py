"""What a model stores and computes, counted from headers and terms.

Parameters are stored weight elements, tied tensors once; bytes are tensor payload, positions
included; active parameters are those that one token passes through; multiply-adds are those of the
weight matrices (attention scores, norms and activations are left out). What experts share counts
once per token in both, as the run time computes it; where that depends on the routing (two bases,
merged experts), the expected number for experts that are chosen equally often and independently.
Merged experts resemble each other, so a token tends to choose several of one group: it then passes
through less than this. k groups are the most that it can.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from math import comb
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..models import (
    BankSite,
    bank_sites,
    find_router,
    is_experts,
    is_of_other_sense,
    own_tensors,
)
from ..runtime import Role, TermModule, is_expert_list, merged_groups, role
from ..terms import Bias, Dense, DynamicDense, ExpertSkip, LowRank, Term
from .fewer import compacted
from .portions import Portions
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
        active_parameters: Those that a token of text passes through; embeddings whole.
        bytes: Tensor payload.
        macs_per_token: Multiply-adds of the weight matrices for one token.
        expert_parameters: Stored weight elements of routed experts.
        expert_bytes: Their payload.
    """

    parameters: int
    active_parameters: int
    bytes: int
    macs_per_token: int
    expert_parameters: int
    expert_bytes: int

    def as_dict(self) -> dict[str, int]:
        """The numbers by name."""
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


def visited(slots: Sequence[int | None], k: int) -> dict[int, Fraction]:
    """How likely a token that visits k different members meets each slot.

    All sets of k members are equally likely (uniform routing without replacement): of M members,
    m in the slot, it is ``1 - C(M - m, k) / C(M, k)``. The sum is the expected number of slots.
    """
    members = len(slots)
    sizes = Counter(slot for slot in slots if slot is not None)
    every = comb(members, k)
    return {slot: 1 - Fraction(comb(members - m, k), every) for slot, m in sizes.items()}


def active_parameters(term: Term, k: int) -> Fraction:
    """Stored elements of a term that one token meets when it visits k members, in expectation.

    A slot that members share is met once, however many of them are visited. Each tensor counts by
    its own slots: one V of a low-rank term, shared by all, is met whole. Channels that a dynamic
    base skips are not met.
    """
    total = Fraction(0)
    for name, tensor in term.tensors().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        stored = tensor.shape[0]
        size = tensor.numel() // stored
        slots = term.slots
        if isinstance(term, LowRank) and (name == "V" or (name == "C" and term.side == "V")):
            slots = term.v_slots
        if any(slot is not None and slot >= stored for slot in slots):
            total += size * min(k, stored)  # a plugin's tensor, with slots of its own
            continue
        dynamic = isinstance(term, DynamicDense) and name == "weight"
        for slot, chance in visited(slots, k).items():
            total += chance * (term.macs(slots.index(slot)) if dynamic else size)
    return total


def _policy(terms: Mapping[str, Sequence[Term]]) -> ExpertSkip | None:
    """Which of a token's experts a layer skips, from all banks' terms; None: it computes all."""
    found = (term for bank in terms.values() for term in bank)
    return next((term for term in found if isinstance(term, ExpertSkip)), None)


def expected(count: Callable[[int], Fraction], k: int, policy: ExpertSkip | None) -> Fraction:
    """What a token meets on average that visits k members, or fewer where it skips some.

    Args:
        count: The same for a number of members.
        k: Experts per token.
        policy: Which are skipped; it knows how often.
    """
    if policy is None or not policy.ratios:
        return count(k)
    parts = (Fraction(share) * count(n) for n, share in enumerate(policy.shares, 1))
    return sum(parts, Fraction(0))


def macs(
    term: Term, k: int, how: Role | None = None, merged: Sequence[int] | None = None
) -> Fraction:
    """Multiply-adds of a term for a token that visits k members, in expectation.

    Args:
        term: The term.
        k: How many different members a token visits.
        how: What the run time shares of the term; None: it computes every member by itself.
        merged: For each member the merged group that is computed as one (see
            `runtime.merged_groups`); None: every member is.
    """
    own = visited(range(term.shape.members) if merged is None else merged, k)
    if how is None or how.groups is None:
        return sum((c * term.macs(member) for member, c in own.items()), Fraction(0))
    chances = visited(how.groups, k)
    if how.whole:
        return sum((c * term.macs(how.groups.index(g)) for g, c in chances.items()), Fraction(0))
    # One factor once per group, which of the two is what `inner` says; the other for each member.
    assert isinstance(term, LowRank)
    once, each = term.inner_macs, term.outer_macs
    if not how.inner:
        once, each = each, once
    served = sum((c for member, c in own.items() if term.has(member)), Fraction(0))
    return sum(chances.values(), Fraction(0)) * once + served * each


def bank_macs(
    layer: nn.Module,
    site: BankSite,
    terms: Iterable[Term],
    k: int,
    merged: Sequence[int] | None = None,
) -> Fraction:
    """Multiply-adds of a bank's terms for one token, as the run time computes them.

    Args:
        layer: The decoder layer that holds the bank.
        site: The bank.
        terms: Its terms.
        k: Experts per token.
        merged: The merged groups of the bank's module, if it has any.
    """
    if site.part == "linear":
        return sum((macs(term, 1) for term in terms), Fraction(0))
    module = layer.get_submodule(site.module)
    if is_expert_list(module):  # called one by one
        return sum((macs(term, k) for term in terms), Fraction(0))
    # A norm on each expert's output keeps down apart.
    apart = site.part == "down" and getattr(module, "has_post_expert_norm", False)
    roles = ((term, None if apart else role(term, site.part, merged)) for term in terms)
    return sum((macs(term, k, how, merged) for term, how in roles), Fraction(0))


def layer_macs(
    layer: nn.Module, terms: Mapping[str, Sequence[Term]], k: int
) -> dict[str, Fraction]:
    """Multiply-adds of each bank of a layer for one token.

    Args:
        layer: The decoder layer.
        terms: All banks' terms by name.
        k: Experts per token.
    """
    sites = bank_sites(layer)
    modules: dict[str, dict[str, Sequence[Term]]] = {}
    for name, site in sites.items():
        if site.part != "linear":
            modules.setdefault(site.module, {})[site.part] = terms[name]
    merged = {module: merged_groups(parts) for module, parts in modules.items()}
    policy = _policy(terms)
    return {
        name: expected(
            partial(bank_macs, layer, site, terms[name], merged=merged.get(site.module)), k, policy
        )
        for name, site in sites.items()
    }


def expert_macs(
    layers: Iterable[nn.Module], k: int, changed: Mapping[int, Mapping[str, list[Term]]]
) -> int:
    """Multiply-adds of the routed experts for one token; see `count`."""
    total = Fraction(0)
    for index, layer in enumerate(layers):
        sites = bank_sites(layer)
        new, _ = compacted(sites, changed.get(index, {}))
        terms = {name: new.get(name, terms_in(layer, site)) for name, site in sites.items()}
        found = layer_macs(layer, terms, k)
        total += sum(found[name] for name, site in sites.items() if site.part != "linear")
    return round(total)


def count(
    source: Source,
    weights: WeightMap,
    layers: Iterable[nn.Module],
    layers_path: str,
    k: int,
    head_macs: int,
    changed: Mapping[int, Mapping[str, list[Term]]],
    without: Collection[str] = (),
    stored: bool = False,
    idle: Container[str] = (),
) -> ModelSizes:
    """Counts a model whose changed modules hold terms.

    Tensors that transformers does not read with the model are stored, and no token meets them.

    Args:
        source: The original's headers.
        weights: The original's weight map.
        layers: The decoder layers (meta is enough).
        layers_path: Their path in the model.
        k: Experts per token.
        head_macs: Multiply-adds of the head, V·H.
        changed: Layer → bank name → terms, all banks of each changed module; empty to count the
            original.
        without: Source tensors that are left out.
        stored: Whether bytes of tensors that are as they were are those that the source takes,
            where it stores them quantised; else those that they take once they are not.
        idle: Tensors of the model that no token of text meets (of a vision tower).
    """
    layers = list(layers)
    gone: set[str] = set()
    packed: dict[str, int] = {}  # a compressed module's tensor → the weights that it holds
    shrunk: dict[str, Fraction] = {}  # a router's tensor → how much of it is left
    routed_tensors: set[str] = set()  # of experts that are as they were
    parameters = bytes_ = expert_parameters = expert_bytes = Fraction(0)
    active = multiply_adds = unmet = Fraction(0)  # expectations: rounded once, at the end
    for index, layer in enumerate(layers):
        sites = bank_sites(layer)
        new, kept = compacted(sites, changed.get(index, {}))
        rows = _kept_rows(layer, sites, kept)
        shrunk |= {f"{layers_path}.{index}.{path}": share for path, share in rows.items()}
        now = {name: new.get(name, terms_in(layer, site)) for name, site in sites.items()}
        multiply_adds += sum(layer_macs(layer, now, k).values())
        for name, site in sites.items():
            routed = site.part != "linear"
            if routed or name in new:
                module = f"{layers_path}.{index}.{site.module}"
                own = {f"{module}.{tensor}" for tensor in own_tensors(layer, site)}
                routed_tensors |= own if routed else set()
            if name in new:
                gone |= own
                parameters += sum(term.parameters() for term in new[name])
                nbytes = sum(term.nbytes() for term in new[name])
                bytes_ += nbytes
                expert_bytes += nbytes if routed else 0
            terms = now[name]
            if routed:
                expert_parameters += sum(term.parameters() for term in terms)
                active += sum(
                    expected(partial(active_parameters, term), k, _policy(now)) for term in terms
                )
        multiply_adds += _router_macs(layer, sites, rows)
        packed |= {
            f"{layers_path}.{index}.{path}.{name}": held
            for path, module in layer.named_modules()
            if isinstance(module, TermModule)
            for name, held in module.elements().items()
        }
    portions = Portions(layers, layers_path)
    routed_tensors -= gone
    for name, info in source.tensors.items():
        targets = weights.targets.get(name, ())
        if name in weights.tied or name in without or (targets and gone.issuperset(targets)):
            continue
        left = next((shrunk[target] for target in targets if target in shrunk), Fraction(1))
        stays = 1 - portions.of(targets, gone)
        taken = (source.stored_bytes(name) if stored else info.nbytes) * left
        bytes_ += taken * stays
        expert_bytes += taken * portions.of(targets, routed_tensors)
        numel = info.numel if info.dtype in FLOATING else 0
        elements = next((packed[t] for t in targets if t in packed), numel) * left
        parameters += elements * stays
        unmet += elements * (portions.of(targets, idle) if targets else 1)
    return ModelSizes(
        int(parameters),
        round(active + parameters - expert_parameters - unmet),
        int(bytes_),
        round(multiply_adds) + head_macs,
        int(expert_parameters),
        int(expert_bytes),
    )


def terms_in(layer: nn.Module, site: BankSite) -> list[Term]:
    """A bank's terms as the (meta) layer holds them."""
    module = layer.get_submodule(site.module)
    if hasattr(module, "specs"):
        return module.terms(site.part) if site.part != "linear" else module.terms()
    dtype = next(module.parameters()).dtype
    return original_terms(site, dtype)


def _kept_rows(
    layer: nn.Module, sites: Mapping[str, BankSite], kept: int | None
) -> dict[str, Fraction]:
    """What is left of each of a router's tensors, by its path, where some experts are removed."""
    router = find_router(layer, sites) if kept is not None else None
    if router is None or kept is None:
        return {}
    rows = {path: router.experts + router.extra.get(path, 0) for path in router.tensors}
    gone = router.experts - kept
    return {path: Fraction(size - gone, size) for path, size in rows.items()}


def _router_macs(
    layer: nn.Module, sites: Mapping[str, BankSite], rows: Mapping[str, Fraction]
) -> int:
    """Multiply-adds of the layer's matrices that are no bank: routers and their like."""
    banks = tuple(site.module + "." for site in sites.values())
    experts = tuple(path + "." for path, module in layer.named_modules() if is_experts(module))
    return sum(
        int(parameter.numel() * rows.get(path, 1))
        for path, parameter in layer.named_parameters()
        if parameter.dim() == 2
        and not path.startswith(banks + experts)
        and not is_of_other_sense(path)
    )
