"""Feeds sums with what passes through the experts of a layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..runtime import observe, observed_forward
from .sums import ForwardSum, Sum

Counter = Callable[[int, torch.Tensor], None]


@contextlib.contextmanager
def listening_to_forwards(
    layer: nn.Module,
    path: str,
    listeners: Sequence[tuple[str, Sum]],
    count: Counter | None = None,
) -> Iterator[None]:
    """While open, sums get the rows of a layer's experts.

    Args:
        layer: The decoder layer.
        path: Where its experts are; their parent is the Mixture-of-Experts block.
        listeners: Sums and what rows they get: of "gate" or "up" the experts' inputs, of "down"
            what enters down, of "output" what the experts give.
        count: Is told of every expert that runs, and its tokens' routing weights.
    """
    module, block = layer.get_submodule(path), layer.get_submodule(path.rpartition(".")[0])
    whole = [total for _, total in listeners if isinstance(total, ForwardSum)]
    entered: list[torch.Tensor] = []

    def tap(
        expert: int,
        token: torch.Tensor,
        slot: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        if count is not None:
            count(expert, weights)
        for part, total in listeners:
            total.add(expert, {"down": h, "output": y}.get(part, x), token, weights)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [_rows(args, kwargs)]

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _rows(args, kwargs)
        for total in whole:
            total.begin(hidden, entered[0])

    def end(*_: Any) -> None:
        for total in whole:
            total.end()

    with contextlib.ExitStack() as stack:
        stack.enter_context(observe(module, tap))
        if whole:
            run = observed_forward(module)
            for handle in (
                block.register_forward_pre_hook(enter, with_kwargs=True),
                run.register_forward_pre_hook(begin, with_kwargs=True),
                run.register_forward_hook(end),
            ):
                stack.callback(handle.remove)
        yield


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden.reshape(-1, hidden.shape[-1])
