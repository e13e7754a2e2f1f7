"""A Mixture-of-Experts block with fewer experts: what depends on their number, and re-routing.

A removed expert's row is taken out of the router, and the family's own code runs over the rows that
are left: their softmax, top-k, groups and correction biases then are what they would be had the
expert never been there. (Logits of -inf would not do: a sigmoid router with correction biases, or
one that normalises before it chooses, gives something else.)

What depends on the number of experts is found by looking: tensors with a dimension E and integers
called after experts, in the block but not in what computes (experts, shared experts). There is no
table of class names; a plan checks what was found against a skeleton built with another number.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .adapter import BankSite, bank_sites, router_groups

# Integers of these names are no number of experts, whatever their value.
_OTHER = re.compile(r"shared|per_tok|top|group|size|dim|freq|step|layer|capacity|_id|idx|index")


@dataclass(frozen=True)
class RouterSite:
    """What of a decoder layer depends on the number of its experts, the experts' weights aside.

    Attributes:
        block: Path of the Mixture-of-Experts block in the layer; "" where that is the layer.
        module: Path of the experts in the layer.
        experts: Their number E.
        tensors: Path in the layer of each tensor with a dimension E → that dimension.
        counts: Paths in the layer of the integer attributes that are E; those of the experts too.
        groups: Into how many equal groups the router divides the experts; 1 without groups.
        top_groups: Of how many groups it chooses experts for one token.
    """

    block: str
    module: str
    experts: int
    tensors: Mapping[str, int]
    counts: tuple[str, ...]
    groups: int = 1
    top_groups: int = 1


def is_count_name(name: str) -> bool:
    """Whether an attribute or a configuration's key of this name may be a number of experts."""
    return "expert" in name and _OTHER.search(name) is None


def find_router(layer: nn.Module, sites: Mapping[str, BankSite] | None = None) -> RouterSite | None:
    """Finds what depends on the number of experts; None in a layer without experts.

    Args:
        layer: The decoder layer, filled or on meta.
        sites: Its bank sites, if they are known.

    Raises:
        UserError: No tensor of the block has a row for each expert.
    """
    sites = bank_sites(layer) if sites is None else sites
    down = next((site for site in sites.values() if site.part == "down"), None)
    if down is None:
        return None
    experts = down.shape.members
    block = down.module.rpartition(".")[0]
    tensors: dict[str, int] = {}
    counts: list[str] = []
    for path, module in _routing_modules(layer, block, down.module, sites):
        prefix = f"{path}." if path else ""
        found = {name: _dimension(tensor, experts) for name, tensor in _own_tensors(module)}
        tensors |= {prefix + name: dim for name, dim in found.items() if dim is not None}
        counts += [prefix + name for name in _counts(module, experts, found)]
    own = layer.get_submodule(down.module)
    counts += [f"{down.module}.{name}" for name in _counts(own, experts, {})]
    if not tensors:
        raise UserError(
            f"{type(layer).__name__}.{block}: no tensor of its router has a row for each of the "
            f"{experts} experts; experts cannot be removed from it yet"
        )
    groups = router_groups(layer.get_submodule(block), experts)
    return RouterSite(block, down.module, experts, tensors, tuple(counts), *groups)


def _routing_modules(
    layer: nn.Module, block: str, experts: str, sites: Mapping[str, BankSite]
) -> Iterator[tuple[str, nn.Module]]:
    """The block itself and what in it is no expert, shared or not, no norm and holds no bank."""
    banks = [site.module for site in sites.values()]
    for inner, module in layer.get_submodule(block).named_modules():
        path = f"{block}.{inner}" if block and inner else block or inner
        if path != block:
            holds = any(bank == path or bank.startswith(path + ".") for bank in banks)
            inside = path.startswith(experts + ".") or "shared" in inner
            if holds or inside or "norm" in type(module).__name__.lower():
                continue
        yield path, module


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _dimension(tensor: torch.Tensor, experts: int) -> int | None:
    """Which dimension of a router's tensor is the experts'; rows come first where two could be."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size == experts]
    return dims[0] if dims else None


def _counts(module: nn.Module, experts: int, found: Mapping[str, int | None]) -> list[str]:
    """Names of a module's integers that are its number of experts."""
    rows = isinstance(module, nn.Linear) and found.get("weight") == 0
    return [
        name
        for name, value in vars(module).items()
        if type(value) is int
        and value == experts
        and (is_count_name(name) or (rows and name == "out_features"))
    ]


@contextlib.contextmanager
def router_of(layer: nn.Module, router: RouterSite, kept: Sequence[int]) -> Iterator[None]:
    """While open, the layer's router knows the kept experts only; the experts are not touched.

    Args:
        layer: The layer, filled.
        router: What `find_router` found in it.
        kept: The experts that stay, ascending.
    """
    with contextlib.ExitStack() as stack:
        for path, dim in router.tensors.items():
            where, _, name = path.rpartition(".")
            module = layer.get_submodule(where)
            store = module._parameters if name in module._parameters else module._buffers
            before = store[name]
            assert before is not None
            store[name] = _sliced(before, dim, kept)
            stack.callback(store.__setitem__, name, before)
        for path in router.counts:
            where, _, name = path.rpartition(".")
            if where != router.module:
                module = layer.get_submodule(where)
                stack.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, len(kept))
        yield


def fewer_experts(layer: nn.Module, router: RouterSite, kept: Sequence[int]) -> nn.Module:
    """The layer's experts, fewer: a module of the same class, fused tensors on meta.

    Args:
        layer: The layer, filled or on meta; it is not changed.
        router: What `find_router` found in it.
        kept: The experts that stay, ascending.
    """
    module = layer.get_submodule(router.module)
    if isinstance(module, nn.ModuleList):
        return nn.ModuleList([module[number] for number in kept]).train(module.training)
    fewer = clone(module)
    for name, tensor in module.named_parameters(recurse=False):
        empty = torch.empty((len(kept), *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
        fewer._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for path in router.counts:
        where, _, name = path.rpartition(".")
        if where == router.module:
            setattr(fewer, name, len(kept))
    return fewer


def _sliced(tensor: torch.Tensor, dim: int, kept: Sequence[int]) -> torch.Tensor:
    index = torch.as_tensor(list(kept), device=tensor.device)
    value = tensor.detach().index_select(dim, index)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def clone(module: nn.Module) -> nn.Module:
    """A module of its own around the same tensors and children, and without anybody's hooks."""
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(copied, name, dict(getattr(module, name)))
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            setattr(copied, name, OrderedDict())
    return copied


class Rerouter:
    """A layer's own router over some of its experts.

    Args:
        layer: The decoder layer, its weights loaded. It is not changed, and its hooks hear nothing.
        sites: Its bank sites, if they are known.

    Raises:
        UserError: The layer's block does not route by itself.
    """

    def __init__(self, layer: nn.Module, sites: Mapping[str, BankSite] | None = None) -> None:
        found = find_router(layer, sites)
        if found is None:
            raise ValueError(f"{type(layer).__name__} has no experts to route to")
        if not found.block:
            raise UserError(
                f"{type(layer).__name__}: its experts are no block of their own; where tokens go "
                "without some of them cannot be told yet"
            )
        self.router = found
        self._name = f"{type(layer).__name__}.{found.block}"
        block = layer.get_submodule(found.block)
        copies = {found.block: clone(block)}
        self._block = copies[found.block]
        held = [path.rpartition(".")[0] for path in (*found.tensors, *found.counts)]
        for path in sorted({path for path in held if not _within(path, found.module)}):
            parent = self._block
            for depth in range(found.block.count(".") + 2, path.count(".") + 2):
                step = ".".join(path.split(".")[:depth])
                if step not in copies:
                    copies[step] = clone(layer.get_submodule(step))
                    parent._modules[step.rpartition(".")[2]] = copies[step]
                parent = copies[step]
        self._copies = copies
        self._tensors = {
            path: layer.get_parameter(path)
            if _is_parameter(layer, path)
            else layer.get_buffer(path)
            for path in found.tensors
        }
        listed = isinstance(layer.get_submodule(found.module), nn.ModuleList)
        for name, child in block.named_children():
            path = f"{found.block}.{name}"
            if path == found.module:
                # A block that calls experts one by one shows its choice in what a child returns.
                self._block._modules[name] = child if listed else _Told()
            elif "shared" in name and path not in copies:
                self._block._modules[name] = _Nothing()
        if listed:
            for copied in copies.values():
                copied.register_forward_hook(_tell)

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, kept: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes tokens among the kept experts.

        Args:
            inputs: What entered the block, [T, H], in the layer's dtype.
            kept: The experts that stay; at least as many as a token chooses, and as many of each
                of the router's groups.

        Returns:
            The chosen experts, numbered among all E, int64 [T, k], and their weights, float32
            [T, k]; on the layer's device.

        Raises:
            UserError: The block does not hand out its choice.
        """
        kept = sorted(kept)
        for path, tensor in self._tensors.items():
            where, _, name = path.rpartition(".")
            module = self._copies[where]
            store = module._parameters if name in module._parameters else module._buffers
            store[name] = _sliced(tensor, self.router.tensors[path], kept)  # type: ignore[assignment]
        for path in self.router.counts:
            where, _, name = path.rpartition(".")
            if where in self._copies:
                setattr(self._copies[where], name, len(kept))
        device = next(iter(self._tensors.values())).device
        try:
            self._block(inputs[None].to(device))
        except _Routed as routed:
            index, weights = routed.args
            return torch.as_tensor(kept, device=device)[index.long()], weights.float()
        raise UserError(
            f"{self._name}: does not hand out the chosen experts and their weights ([tokens, k] "
            "each); where tokens go without some experts cannot be told yet"
        )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def _is_parameter(layer: nn.Module, path: str) -> bool:
    where, _, name = path.rpartition(".")
    return name in layer.get_submodule(where)._parameters


class _Routed(Exception):
    """Carries a router's choice, indices and weights [T, k], out of the block's forward."""


class _Told(nn.Module):
    """Stands for experts: ends the forward with what they are told of the routing."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        choice = _choice((*args, *kwargs.values()))
        if choice is not None:
            raise _Routed(*choice)


class _Nothing(nn.Module):
    """Stands for shared experts, which have no part in routing."""

    def forward(self, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _tell(module: nn.Module, args: Any, output: Any) -> None:
    choice = _choice(output) if isinstance(output, tuple | list) else None
    if choice is not None:
        raise _Routed(*choice)


def _choice(values: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Indices and weights [T, k] among what a router gave; None if they are not there."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim() == 2]
    for index in tensors:
        if not index.is_floating_point():
            for weights in tensors:
                if weights.is_floating_point() and weights.shape == index.shape:
                    return index, weights
    return None
