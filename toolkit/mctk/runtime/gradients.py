"""What weight gradients are made of, told in the backward pass: no weight gradient ever exists.

The gradient of a matrix in ``y = x Wᵀ`` is ``grad_yᵀ x``. Whoever wants its square per sequence
needs the two factors, token by token, and not their sum over a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .names import check_implementation
from .owner import TermModule

_OBSERVER = "_mctk_gradient_observer"


class GradientObserver(Protocol):
    """Is told of every matrix of an expert that gradients pass through.

    Args:
        name: "gate_up" (in the module's own order of rows), "up" or "down".
        expert: The expert's number.
        token_index: Rows of the module's hidden states, ``[n]``, in ascending order.
        x: What entered the matrix, ``[n, in]``.
        grad: Gradient with respect to what left it (before its bias), ``[n, out]``.
    """

    def __call__(
        self, name: str, expert: int, token_index: Tensor, x: Tensor, grad: Tensor, /
    ) -> None:
        """See the class."""


@contextlib.contextmanager
def observe_gradients(module: nn.Module, observer: GradientObserver) -> Iterator[None]:
    """Tells `observer` of the gradients of forwards that run while the context is open.

    The outputs of those forwards are the same bits as without. Weights get no gradient.

    Args:
        module: An original experts module that runs by our loop.
        observer: Is called in the backward pass, without gradients being recorded.

    Raises:
        ValueError: The module is compressed, or would not run by our loop.
    """
    if isinstance(module, TermModule):
        raise ValueError(f"{type(module).__name__}: gradients are taken of original weights only")
    check_implementation(module)
    before = getattr(module, _OBSERVER, None)
    setattr(module, _OBSERVER, observer)
    try:
        yield
    finally:
        setattr(module, _OBSERVER, before)


def observed_product(
    module: nn.Module, top_k_index: Tensor, experts: int
) -> Callable[[str, int, Tensor, Tensor], Tensor] | None:
    """The product that tells the module's observer; None while nobody observes.

    Args:
        module: An experts module.
        top_k_index: Chosen experts of this forward, ``[T, k]``.
        experts: Their number E.

    Returns:
        (a weight's name, expert, inputs ``[n, in]``, the expert's weight) → outputs ``[n, out]``.
    """
    observer: GradientObserver | None = getattr(module, _OBSERVER, None)
    if observer is None:
        return None
    choices = top_k_index.reshape(-1)
    counts = torch.bincount(choices, minlength=experts).tolist()
    tokens = (torch.argsort(choices, stable=True) // top_k_index.shape[1]).split(counts)
    transposed = bool(module.is_transposed)

    def product(name: str, number: int, x: Tensor, weight: Tensor) -> Tensor:
        def report(x: Tensor, grad: Tensor) -> None:
            observer(name.removesuffix("_proj"), number, tokens[number], x, grad)

        return _Product.apply(x, weight, transposed, report)

    return product


class _Product(torch.autograd.Function):
    """A matrix product whose backward pass reports and passes on the gradient of x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        transposed: bool,
        report: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.report = transposed, report
        return x @ weight if transposed else F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.report(x, grad)
        return grad @ (weight.T if ctx.transposed else weight), None, None, None
