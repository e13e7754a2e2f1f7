"""Gradients through layers of remote code: what its authors switched off for inference."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..runtime.remote import REMOTE


@contextlib.contextmanager
def gradients_enabled(layer: nn.Module) -> Iterator[None]:
    """Lets gradients pass through a layer of remote code, which stays in evaluation mode.

    DeepSeek-MoE's `moe_infer` is decorated with `torch.no_grad()`: the input would get the gradient
    of the shared experts alone, silently. While this is open the functions underneath run instead.
    What they compute is the same; its sums in place, which autograd cannot undo, are written as
    additions that it can (`_Differentiable`). Training mode would be no way: it adds the router's
    auxiliary loss to the gradients.

    transformers' own layers are left alone.

    Args:
        layer: A decoder layer; the context is open around its forward and backward.
    """
    with contextlib.ExitStack() as stack:
        undecorated = False
        for module in layer.modules():
            if type(module).__module__.split(".")[0] != REMOTE:
                continue
            for name, function in _without_gradients(type(module)).items():
                setattr(module, name, MethodType(function, module))  # shadows the class's method
                stack.callback(delattr, module, name)
                undecorated = True
        if undecorated:
            stack.enter_context(_Differentiable())
        yield


def _without_gradients(cls: type) -> dict[str, Callable[..., Any]]:
    """Methods of a class that run without gradients: name → the function under the decorator."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            found.pop(name, None)  # overridden
            function = getattr(value, "__wrapped__", None)
            if isinstance(value, FunctionType) and function is not None and _is_no_grad(value):
                found[name] = function
    return found


def _is_no_grad(function: FunctionType) -> bool:
    """Whether a function came out of torch's `no_grad` or `inference_mode` as a decorator."""
    make = inspect.getclosurevars(function).nonlocals.get("ctx_factory")
    return isinstance(getattr(make, "__self__", None), torch.no_grad | torch.inference_mode)


class _Differentiable(TorchFunctionMode):
    """Runs `scatter_reduce_(..., reduce="sum")` as `scatter_add_`.

    They add the same numbers. The backward pass of the first wants the sum as it was, and a block
    that adds up its experts in place has changed it by then; that of the second wants none.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.scatter_reduce_:
            names = ("self", "dim", "index", "src", "reduce")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if given["reduce"] == "sum" and given.get("include_self", True) and len(args) <= 5:
                return given["self"].scatter_add_(given["dim"], given["index"], given["src"])
        return function(*args, **kwargs)
