"""Samples of what a Mixture-of-Experts block does with some tokens, for choosing among its experts.

Memory is bounded: the experts run one after the other on a chunk of the tokens, and of a chunk only
the inner products of their outputs are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..runtime import run_expert
from .listen import listening_to_forwards
from .needs import RoutedOutputs
from .sums import ForwardSum
from .values import RoutedSample, unbound

if TYPE_CHECKING:
    from ..models import BankSite

CHUNK = 2**26
"""Elements of the outputs of all experts that are in memory at once (256 MB)."""


class _First(ForwardSum):
    """Of the first tokens that pass, the routing weight that each of E experts has, [n, E]."""

    def __init__(self, tokens: int, experts: int, device: torch.device) -> None:
        self.left, self.experts, self.device = tokens, experts, device
        self.weights = torch.zeros(0, experts)
        self.hidden = self.entered = torch.zeros(0)

    def begin(self, hidden: torch.Tensor, entered: torch.Tensor) -> None:
        """See `ForwardSum`."""
        self.hidden, self.entered = hidden[: self.left], entered[: self.left]
        count = self.hidden.shape[0]
        self.weights = torch.zeros(count, self.experts, dtype=torch.float32, device=self.device)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`."""
        taken = token < self.weights.shape[0]
        self.weights[:, member].index_add_(0, token[taken], weights[taken].float())

    def end(self) -> None:
        """See `ForwardSum`."""
        self.left -= self.hidden.shape[0]
        self.hidden = self.entered = self.hidden[:0]


class RoutedGrams(_First):
    """Collects a `RoutedSample`.

    Args:
        need: How many tokens.
        module: The experts.
        experts: E.
        device: Where products are made; the sample lies on the CPU.
        reference: z of the sample's tokens, float32 [n, H], if it is not what the routed experts
            give here: where the block is fed by compressed layers, what the original's gave.
    """

    def __init__(
        self,
        need: RoutedOutputs,
        module: nn.Module,
        experts: int,
        device: torch.device,
        reference: torch.Tensor | None = None,
    ) -> None:
        super().__init__(need.tokens, experts, device)
        self.module, self.reference = module, reference
        self.parts: dict[str, list[torch.Tensor]] = {
            name: [] for name in ("inputs", "gram", "target", "energy")
        }
        self.taken = 0

    def end(self) -> None:
        """See `ForwardSum`: now the other experts run on the tokens too."""
        self.parts["inputs"].append(self.entered.cpu())
        rows = max(1, CHUNK // (self.experts * max(self.hidden.shape[-1], 1)))
        for start in range(0, self.hidden.shape[0], rows):
            part = slice(start, start + rows)
            self._chunk(self.hidden[part], self.weights[part])
        super().end()

    def _chunk(self, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """Takes tokens, [n, H], and their routing weights, [n, E]."""
        count = hidden.shape[0]
        y = torch.empty(
            (count, self.experts, hidden.shape[1]), dtype=torch.float32, device=self.device
        )
        for expert in range(self.experts):
            y[:, expert] = run_expert(self.module, expert, hidden)
        gram = y @ y.transpose(1, 2)
        if self.reference is None:
            # z is a sum of the y: by the Gram matrix, so that keeping all experts costs exactly 0.
            target = (gram.double() @ weights.double()[..., None])[..., 0]
            energy = (target * weights).sum(1)
        else:
            z = self.reference[self.taken : self.taken + count].to(self.device, torch.float32)
            if z.shape[0] != count:
                raise ValueError(f"a reference of {self.reference.shape[0]} tokens is too short")
            target = (y @ z[..., None])[..., 0]
            energy = z.double().square().sum(1)
        self.taken += count
        for name, value in (("gram", gram), ("target", target), ("energy", energy)):
            self.parts[name].append(value.float().cpu())

    def value(self) -> RoutedSample:
        """See `Sum`; without a `route` as yet (`LayerStatistics.bind`)."""
        shapes = {"inputs": (0, 0), "gram": (0, self.experts, self.experts), "energy": (0,)}
        found = {
            name: torch.cat(parts) if parts else torch.zeros(shapes.get(name, (0, self.experts)))
            for name, parts in self.parts.items()
        }
        return RoutedSample(**found, route=unbound)


class RoutedSum(_First):
    """Records z, what the routed experts of a layer give together, of the first tokens that pass.

    Args:
        layer: The decoder layer, filled.
        sites: Its bank sites by name; one of them is an experts bank.
        tokens: How many tokens at most.
        device: Where the layer runs.
    """

    def __init__(
        self, layer: nn.Module, sites: Mapping[str, BankSite], tokens: int, device: torch.device
    ) -> None:
        self.site = next(site for site in sites.values() if site.part == "down")
        super().__init__(tokens, self.site.shape.members, device)
        self.layer = layer
        self.sum = torch.zeros(0)
        self.parts: list[torch.Tensor] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While open, what passes through the layer is recorded."""
        with listening_to_forwards(self.layer, self.site.module, [("output", self)]):
            yield

    def begin(self, hidden: torch.Tensor, entered: torch.Tensor) -> None:
        """See `ForwardSum`."""
        super().begin(hidden, entered)
        self.sum = torch.zeros(self.hidden.shape, dtype=torch.float32, device=self.device)

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`: x are outputs."""
        taken = token < self.sum.shape[0]
        self.sum.index_add_(0, token[taken], x[taken].float() * weights[taken].float()[:, None])

    def end(self) -> None:
        """See `ForwardSum`."""
        self.parts.append(self.sum.cpu())
        super().end()

    def value(self) -> torch.Tensor:
        """z, float32 [n, H], on the CPU."""
        return torch.cat(self.parts)
