"""A family's own router run over some of its experts: where tokens go without the others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .routing import clone, find_router, router_of
from .sites import BankSite


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
        _check_alone(block, self._name)
        copies = {found.block: clone(block)}
        self._block = copies[found.block]
        changed = (*found.tensors, *found.tables, *found.counts)
        held = [path.rpartition(".")[0] for path in changed]
        held += found.configs
        for path in sorted({path for path in held if not _within(path, found.module)}):
            parent = self._block
            for depth in range(found.block.count(".") + 2, path.count(".") + 2):
                step = ".".join(path.split(".")[:depth])
                if step not in copies:
                    copies[step] = clone(layer.get_submodule(step))
                    parent._modules[step.rpartition(".")[2]] = copies[step]
                parent = copies[step]
        self._copies = copies
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
        where, _, name = next(iter(self.router.tensors)).rpartition(".")
        device = getattr(self._copies[where], name).device
        try:
            with router_of(self._copies.__getitem__, self.router, kept):
                self._block(inputs[None].to(device))
        except _Routed as routed:
            index, weights = routed.args
            return torch.as_tensor(kept, device=device)[index.long()], weights.float()
        raise UserError(
            f"{self._name}: does not hand out the chosen experts and their weights ([tokens, k] "
            "each); where tokens go without some experts cannot be told yet"
        )


def _check_alone(block: nn.Module, name: str) -> None:
    """Refuses a block whose routing depends on more than the hidden states that enter it."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    others = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if others:
        raise UserError(
            f"{name}: is given {', '.join(others)} beside the hidden states; where tokens go "
            "without some experts cannot be told from those alone: take a method that does not "
            "route anew"
        )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


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

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
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
