"""A Mixture-of-Experts block with fewer experts: what depends on their number.

A removed expert's row is taken out of the router, and the family's own code runs over the rows that
are left: their softmax, top-k, groups and correction biases then are what they would be had the
expert never been there. (Logits of -inf would not do: a sigmoid router with correction biases, or
one that normalises before it chooses, gives something else.)

What depends on the number of experts is found by looking: tensors with a dimension E, integers
called after experts, and tables of experts' numbers, in the block but not in what computes
(experts, shared experts). There is no table of class names; a plan checks what was found against a
skeleton built with another number.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import UserError
from ..runtime import is_count_name, is_total_name, with_fewer
from .sites import BankSite, bank_sites, router_groups


@dataclass(frozen=True)
class RouterSite:
    """What of a decoder layer depends on the number of its experts, the experts' weights aside.

    Attributes:
        block: Path of the Mixture-of-Experts block in the layer; "" where that is the layer.
        module: Path of the experts in the layer.
        experts: Their number E.
        tensors: Path in the layer of each tensor with a dimension for the experts → that dimension.
        counts: Paths in the layer of the integer attributes that are E, or E and `extra`; those of
            the experts too.
        groups: Into how many equal groups the router divides the experts; 1 without groups.
        top_groups: Of how many groups it chooses experts for one token.
        extra: Of tensors whose dimension is longer than E, by how much: behind the experts come
            rows for what shares their router (shared experts, a choice that computes nothing).
        tables: Paths of integer tensors whose entries are experts' numbers.
        configs: Paths of the modules that hold a configuration which says E.
    """

    block: str
    module: str
    experts: int
    tensors: Mapping[str, int]
    counts: tuple[str, ...]
    groups: int = 1
    top_groups: int = 1
    extra: Mapping[str, int] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()

    def smaller(self, path: str, tensor: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """A router's tensor with the kept experts only; a parameter stays one."""
        value = tensor.detach()
        if path in self.tables:
            value = renumbered(value, kept)
        else:
            beyond = range(self.experts, self.experts + self.extra.get(path, 0))
            index = torch.as_tensor([*kept, *beyond], device=tensor.device)
            value = value.index_select(self.tensors[path], index)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(value, requires_grad=False)
        return value


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
    routing = dict(_routing_modules(layer, block, down.module, sites))
    totals = {total for module in routing.values() for total in _totals(module, experts)}
    tensors: dict[str, int] = {}
    extra: dict[str, int] = {}
    tables: list[str] = []
    counts: list[str] = []
    for path, module in routing.items():
        prefix = f"{path}." if path else ""
        rows = False
        for name, tensor in _own_tensors(module):
            if _is_table(tensor):
                tables.append(prefix + name)
                continue
            found = _dimension(tensor, {experts, *totals})
            if found is not None:
                tensors[prefix + name] = found
                rows = rows or found == 0
                if tensor.shape[found] > experts:
                    extra[prefix + name] = tensor.shape[found] - experts
        counts += [prefix + name for name in _counts(module, experts, rows, totals)]
    own = layer.get_submodule(down.module)
    counts += [f"{down.module}.{name}" for name in _counts(own, experts)]
    if not tensors:
        raise UserError(
            f"{type(layer).__name__}.{block}: no tensor of its router has a row for each of the "
            f"{experts} experts; experts cannot be removed from it yet"
        )
    groups, top_groups = router_groups(layer.get_submodule(block), experts)
    return RouterSite(
        block,
        down.module,
        experts,
        tensors,
        tuple(counts),
        groups,
        top_groups,
        extra,
        tuple(tables),
        tuple(path for path, module in routing.items() if _says(module, experts)),
    )


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
            # A norm's weight may have one entry per expert by chance; its class tells.
            if holds or inside or "norm" in type(module).__name__.lower():
                continue
        yield path, module


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _is_table(tensor: torch.Tensor) -> bool:
    """Whether a router's tensor says for each of many inputs (tokens' ids) which experts it takes.

    Such a router has no choice to compute; its entries are integers, one row an input.
    """
    integers = not (tensor.is_floating_point() or tensor.is_complex())
    return integers and tensor.dtype != torch.bool and tensor.dim() == 2


def _dimension(tensor: torch.Tensor, sizes: set[int]) -> int | None:
    """Which dimension of a router's tensor is the experts'; rows come first where two could be."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size in sizes]
    return dims[0] if dims else None


def _totals(module: nn.Module, experts: int) -> list[int]:
    """What a module calls the number of all that its router chooses among, beyond its experts."""
    return [
        value
        for name, value in vars(module).items()
        if type(value) is int and experts < value <= 2 * experts and is_total_name(name)
    ]


def _counts(
    module: nn.Module, experts: int, rows: bool = False, totals: set[int] | None = None
) -> list[str]:
    """Names of a module's integers that are its number of experts, or a total beyond it."""
    totals = totals or set()
    linear = rows and isinstance(module, nn.Linear)
    return [
        name
        for name, value in vars(module).items()
        if type(value) is int
        and (
            (value == experts and is_count_name(name))
            or (value in totals and is_total_name(name))
            or (linear and name == "out_features")
        )
    ]


def _says(module: nn.Module, experts: int) -> bool:
    """Whether a module holds a configuration that says the number of experts."""
    config = vars(module).get("config")
    return config is not None and any(
        type(value) is int and value == experts and is_count_name(name)
        for name, value in vars(config).items()
    )


def renumbered(table: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """A table of experts' numbers where only some experts are left.

    Kept experts get their new numbers. In place of a removed one comes the next kept one, in the
    order of numbers and around the end, that its row does not have yet.

    Args:
        table: Experts' numbers, integers [rows, k], different within a row.
        kept: The experts that stay, ascending; at least k.
    """
    device = table.device
    stay = torch.as_tensor(list(kept), device=device)
    old = table.long().contiguous()
    new = torch.searchsorted(stay, old)  # a removed expert's is that of the next kept one
    gone = stay[new.clamp(max=len(stay) - 1)] != old
    new[gone] = new[gone] % len(stay)
    taken = torch.where(gone, -1, new)
    for column in range(table.shape[1]):
        rows = gone[:, column].nonzero()[:, 0]
        while len(rows):
            clash = (taken[rows] == new[rows, column, None]).any(1)
            taken[rows[~clash], column] = new[rows[~clash], column]
            rows = rows[clash]
            new[rows, column] = (new[rows, column] + 1) % len(stay)
    return new.to(table.dtype)


@contextlib.contextmanager
def router_of(
    module_at: Callable[[str], nn.Module], router: RouterSite, kept: Sequence[int]
) -> Iterator[None]:
    """While open, a layer's router knows the kept experts only; the experts are not touched.

    Args:
        module_at: The layer's module of a path, filled: its `get_submodule`, or copies.
        router: What `find_router` found in it.
        kept: The experts that stay, ascending.
    """
    gone = router.experts - len(kept)
    with contextlib.ExitStack() as stack:
        for path in (*router.tensors, *router.tables):
            where, _, name = path.rpartition(".")
            module = module_at(where)
            store = module._parameters if name in module._parameters else module._buffers
            before = store[name]
            assert before is not None
            store[name] = router.smaller(path, before, kept)
            stack.callback(store.__setitem__, name, before)
        for path in router.counts:
            where, _, name = path.rpartition(".")
            if where != router.module:
                module = module_at(where)
                value = getattr(module, name)
                stack.callback(setattr, module, name, value)
                setattr(module, name, value - gone)
        for path in router.configs:
            module = module_at(path)
            stack.callback(setattr, module, "config", module.config)
            module.config = with_fewer(module.config, router.experts, len(kept))
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


def clone(module: nn.Module) -> nn.Module:
    """A module of its own around the same tensors and children, and without anybody's hooks."""
    copied = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(copied, name, dict(getattr(module, name)))
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            setattr(copied, name, OrderedDict())
    return copied
