"""Squared weight gradients of one layer, sequence by sequence, while the backward sweep visits it.

The gradient of a sequence's loss in a matrix is the sum over its tokens of grad_y xᵀ. A batch holds
several sequences, and the square of their sum is not the sum of their squares: so the tokens that
reach a matrix are split by sequence first. What is squared is exact, whatever the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError
from ..runtime import TermModule, gate_up_rows, observe_forwards, observe_gradients
from .needs import ChannelFisher, Fisher, Need

if TYPE_CHECKING:
    from ..models import BankSite


@dataclass
class _Squares:
    """Sums of squared gradients of one bank, of every entry, of channels, or all of them.

    Attributes:
        rows: Which of the outputs that the module computes at once are the bank's.
        gradient: Room for one matrix, [out, in].
        entries: float32 [members, out, in], if asked for.
        channels: By side, as far as asked for: float64 [members, in] and [members, out].
    """

    rows: slice
    gradient: torch.Tensor
    entries: torch.Tensor | None = None
    channels: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, member: int, x: torch.Tensor, grad: torch.Tensor, counts: list[int]) -> None:
        """Adds the squares of a member's rows x [n, in] and grad [n, ...], `counts` a sequence."""
        for inputs, outputs in zip(x.split(counts), grad[:, self.rows].split(counts), strict=True):
            if inputs.shape[0]:
                torch.mm(outputs.T, inputs, out=self.gradient)
                if self.entries is not None:
                    self.entries[member].addcmul_(self.gradient, self.gradient)
                if self.channels:
                    self.gradient.square_()
                    for side, total in self.channels.items():
                        total[member] += self.gradient.sum(0 if side == "input" else 1)


class _Tap:
    """What is collected from one module, and whether all of its gradients came.

    Args:
        name: The module, for messages.
        length: Tokens T of a sequence.
    """

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length
        self.squares: dict[str, list[_Squares]] = {}
        self.sequences = 0
        self.went = 0  # rows that the last forward multiplied by each matrix
        self.came: dict[str, int] = {}  # of them, those whose gradient came back
        self._last: tuple[torch.Tensor | None, list[int]] = None, []

    def forward(self, tokens: int, rows: int) -> None:
        """A forward of so many tokens begins, which go through the matrices as so many rows."""
        self.check()
        if tokens % self.length:
            raise UserError(
                f"{self.name}: gets {tokens} tokens at once, not whole sequences of {self.length}; "
                "gradients of single sequences cannot be told apart"
            )
        self.sequences += tokens // self.length
        self.went = rows
        self.came = dict.fromkeys(self.squares, 0)

    def backward(
        self, part: str, member: int, token: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """Gradients of a member came: rows x [n, in] and grad [n, out] of tokens [n], ascending."""
        if part not in self.squares:
            return
        self.came[part] += x.shape[0]
        if self._last[0] is not token:  # an expert's matrices come one after the other
            self._last = token, torch.bincount(token // self.length).tolist()
        x, grad = x.float(), grad.float()
        for squares in self.squares[part]:
            squares.add(member, x, grad, self._last[1])

    def check(self) -> None:
        """Checks that the gradients of the last forward came, every one once.

        Raises:
            UserError: They did not: what was summed is not the Fisher.
        """
        for part, came in self.came.items():
            if came != self.went:
                raise UserError(
                    f"{self.name}: gradients came for {came} of the {self.went} rows that went "
                    f"through {part}: it runs without gradients, twice in a forward, or into "
                    "nothing that the loss depends on; its Fisher information is not to be had"
                )


class GradientCollector:
    """Collects squared gradients of one filled layer of original modules.

    Args:
        layer: The decoder layer.
        index: Its number.
        sites: Its bank sites by name.
        needs: The `Fisher` and `ChannelFisher` needs among them are collected; all of the labels
            that the sweep runs with.
        tokens_per_sequence: T; batches hold whole sequences, one after the other.
        device: Where sums are kept: where the layer computes.

    Raises:
        UserError: The layer is compressed already.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        sites: dict[str, BankSite],
        needs: Iterable[Need],
        tokens_per_sequence: int,
        device: torch.device,
    ) -> None:
        wanted = [need for need in needs if isinstance(need, Fisher | ChannelFisher)]
        if len({need.labels for need in wanted}) > 1:
            raise ValueError("one sweep has gradients for one kind of labels")
        self.taps: dict[str, _Tap] = {}
        self.modules: dict[str, nn.Module] = {}
        self._wanted = wanted
        self._sums: dict[str, tuple[_Tap, _Squares]] = {}  # by bank
        for need in wanted:
            site = sites[need.bank]
            module = layer.get_submodule(site.module)
            if isinstance(module, TermModule):
                raise UserError(
                    f"layer {index}, {need.bank}: is compressed already; Fisher information is "
                    "of original weights only"
                )
            members, out, columns = (
                site.shape.members,
                site.shape.out_features,
                site.shape.in_features,
            )
            if need.bank not in self._sums:
                room = torch.empty(out, columns, dtype=torch.float32, device=device)
                squares = _Squares(_rows(module, site), room)
                name = f"layer {index}, {site.module}"
                tap = self.taps.setdefault(site.module, _Tap(name, tokens_per_sequence))
                tap.squares.setdefault(_matrix(module, site), []).append(squares)
                self.modules[site.module] = module
                self._sums[need.bank] = tap, squares
            squares = self._sums[need.bank][1]
            if isinstance(need, Fisher):
                squares.entries = torch.zeros(members, out, columns, device=device)
            else:
                channels = columns if need.side == "input" else out
                squares.channels[need.side] = torch.zeros(
                    members, channels, dtype=torch.float64, device=device
                )

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, gradients of the layer are squared and summed."""
        with contextlib.ExitStack() as stack:
            for path, tap in self.taps.items():
                module = self.modules[path]
                if isinstance(module, nn.Linear):
                    handle = module.register_forward_hook(_linear_hook(tap))
                    stack.callback(handle.remove)
                else:
                    stack.enter_context(observe_forwards(module, tap.forward))
                    stack.enter_context(observe_gradients(module, tap.backward))
            yield

    def result(self) -> dict[Need, torch.Tensor]:
        """Mean squared gradients, float32: [members, out, in], or [members, channels] of sums.

        Divides in place: it is called once.

        Raises:
            UserError: Some gradients never came, or none was asked for.
        """
        values: dict[Need, torch.Tensor] = {}
        for need in self._wanted:
            tap, squares = self._sums[need.bank]
            tap.check()
            if not tap.sequences:
                raise UserError(f"{tap.name}: was not run; it has no Fisher information")
            total = squares.entries if isinstance(need, Fisher) else squares.channels[need.side]
            assert total is not None
            values[need] = total.div_(tap.sequences).float()
        return values


def _matrix(module: nn.Module, site: BankSite) -> str:
    """The name under which gradients of a bank's matrices come; a list of experts fuses none."""
    if site.part in ("gate", "up") and getattr(module, "has_gate", False):
        return "gate_up"
    return site.part


def _rows(module: nn.Module, site: BankSite) -> slice:
    """Which of the outputs that an experts module computes at once are the bank's."""
    if _matrix(module, site) != "gate_up":
        return slice(None)
    return gate_up_rows(module, site.part, site.shape.out_features)


def _linear_hook(tap: _Tap) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].detach()
        # [B, T, in], with heads between perhaps, or [B·T, in] as MoE blocks have it.
        if x.dim() > 2 and tap.length not in x.shape[1:-1]:
            if not bool(x.any()):
                return  # what stands before a sequence's first token: nothing to any gradient
            raise UserError(
                f"{tap.name}: gets {list(x.shape)} where [batch, {tap.length}, features] was "
                "expected; gradients of single sequences cannot be told apart"
            )
        rows = x.reshape(-1, x.shape[-1])
        tokens = x.shape[0] * (tap.length if x.dim() > 2 else 1)
        tap.forward(tokens, rows.shape[0])
        if not output.requires_grad:
            return  # found out when the gradients are asked for
        token = torch.arange(rows.shape[0], device=x.device) * tokens // rows.shape[0]

        version = rows._version

        def backward(grad: torch.Tensor) -> None:
            if rows._version != version:
                raise UserError(
                    f"{tap.name}: its inputs are changed in place after it has run; its Fisher "
                    "information is not to be had"
                )
            tap.backward("linear", 0, token, rows, grad.reshape(rows.shape[0], -1))

        output.register_hook(backward)

    return hook
