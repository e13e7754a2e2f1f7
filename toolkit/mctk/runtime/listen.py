"""Who listens to experts: the same calls for transformers' experts modules and for lists.

An experts module tells by itself what passes (`experts`, `gradients`); a list is hooked, and its
block's router says whose tokens the rows are (`expert_list.Routing`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .expert_list import (
    LIST_OBSERVER,
    Routing,
    TermExpertList,
    is_expert_list,
    observed_forward,
)
from .experts import Observer
from .experts import observe as observe_module
from .gradients import GradientObserver
from .gradients import observe_gradients as observe_module_gradients
from .list_layout import linears

# On a module of fewer experts: the numbers that they had before the others were removed.
NUMBERS = "_mctk_numbers"


@contextlib.contextmanager
def observe(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Tells `observer` of every expert that an experts module or a list of experts runs.

    Where others were removed for a while (`models.installed`), experts bear their old numbers.

    Raises:
        ValueError: The module would not run by our loop; see `experts.observe`.
        UserError: While the forward runs: a list's router does not tell its choices and weights.
    """
    numbers = getattr(module, NUMBERS, None)
    if numbers is not None:
        told = observer

        def observer(expert: int, *rest: Any) -> None:
            told(numbers[expert], *rest)

    if not is_expert_list(module):
        with observe_module(module, observer):
            yield
        return
    routing = Routing(module)

    def report(number: int, x: Tensor, h: Tensor, y: Tensor) -> None:
        x, h, y = (rows.reshape(-1, rows.shape[-1]) for rows in (x, h, y))
        token, slot, weights, order = routing.rows_of(number, x)
        if order is not None:
            x, h, y = x[order], h[order], y[order]
        observer(number, token, slot, x, h, y, weights)

    with contextlib.ExitStack() as stack:
        routing.listen(stack)
        if isinstance(module, TermExpertList):
            before = getattr(module, LIST_OBSERVER, None)
            setattr(module, LIST_OBSERVER, report)
            stack.callback(setattr, module, LIST_OBSERVER, before)
        else:
            assert isinstance(module, nn.ModuleList)
            for number, expert in enumerate(module):
                _listen_to_expert(stack, expert, number, report)
        yield


def _listen_to_expert(
    stack: contextlib.ExitStack,
    expert: nn.Module,
    number: int,
    report: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    layers = linears(expert)
    assert layers is not None
    entered: list[Tensor] = []

    def before_down(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        report(number, args[0], entered.pop(), output)

    for handle in (
        layers["down"].register_forward_pre_hook(before_down),
        expert.register_forward_hook(after),
    ):
        stack.callback(handle.remove)


@contextlib.contextmanager
def observe_forwards(module: nn.Module, begin: Callable[[int, int], None]) -> Iterator[None]:
    """Tells of each forward of an experts module or a list of experts before its experts run.

    Args:
        module: The module.
        begin: Is called with the number of tokens and of (token, expert) pairs. Of a list whose
            router does not tell its choices it is never called.
    """

    def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        begin(given["hidden_states"].shape[0], given["top_k_index"].numel())

    with contextlib.ExitStack() as stack:
        if is_expert_list(module):
            routing = Routing(module, begin)
            routing.listen(stack)
        else:
            handle = module.register_forward_pre_hook(called, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def observe_gradients(module: nn.Module, observer: GradientObserver) -> Iterator[None]:
    """Tells `observer` of the gradients of an experts module or an original list of experts.

    Of a list it hears of "gate", "up" and "down", and all rows bear the token index 0: which
    sequence a row belongs to is only known where there is one, so a forward may hold one.

    Raises:
        ValueError: The module is compressed, or would not run by our loop; while the forward runs:
            a list gets several sequences at once.
    """
    if not is_expert_list(module):
        with observe_module_gradients(module, observer):
            yield
        return
    if not isinstance(module, nn.ModuleList):
        raise ValueError(f"{type(module).__name__}: gradients are taken of original weights only")

    def one_sequence(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3 or hidden.shape[0] != 1:
            raise ValueError(
                f"gradients of a list of experts take one sequence [1, T, H] at a time, not "
                f"{list(hidden.shape)}"
            )

    with contextlib.ExitStack() as stack:
        block = observed_forward(module)
        handle = block.register_forward_pre_hook(one_sequence, with_kwargs=True)
        stack.callback(handle.remove)
        for number, expert in enumerate(module):
            layers = linears(expert)
            assert layers is not None
            for part, layer in layers.items():
                tap = _gradient_tap(observer, part, number)
                stack.callback(layer.register_forward_hook(tap).remove)
        yield


def _gradient_tap(observer: GradientObserver, part: str, number: int) -> Callable[..., None]:
    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach()
        token = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        output.register_hook(lambda grad: observer(part, number, token, x, grad))

    return after
