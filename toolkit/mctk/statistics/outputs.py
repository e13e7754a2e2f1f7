"""What experts give: sums over the tokens routed to them, and means over all tokens."""

from __future__ import annotations

import torch
from torch import nn

from ..runtime import run_expert
from .sums import ForwardSum
from .values import OutputSums


class OutputTotals:
    """Accumulates `OutputSums` in float64; its rows are outputs, before routing weights.

    Args:
        experts: E.
        hidden: H.
        device: Where sums are kept.
    """

    def __init__(self, experts: int, hidden: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = torch.zeros(experts, dtype=torch.int64)
        self.norm, self.weighted_norm, self.largest = (zeros(experts) for _ in range(3))
        self.total, self.square = (zeros(experts, hidden) for _ in range(2))

    def add(self, member: int, x: torch.Tensor, token: torch.Tensor, weights: torch.Tensor) -> None:
        """See `Sum`: x are outputs [n, H] of expert `member`."""
        y = x.double()
        norm = y.norm(dim=1)
        self.count[member] += y.shape[0]
        self.norm[member] += norm.sum()
        self.weighted_norm[member] += weights.double() @ norm
        if y.shape[0]:
            self.largest[member] = torch.maximum(self.largest[member], norm.max())
        self.total[member] += y.sum(0)
        self.square[member] += y.square().sum(0)

    def value(self) -> OutputSums:
        """See `Sum`."""
        return OutputSums(
            self.count,
            self.norm.cpu(),
            self.weighted_norm.cpu(),
            self.largest.cpu(),
            self.total.cpu(),
            self.square.cpu(),
        )


class EveryMean(ForwardSum):
    """Accumulates each expert's mean output over all tokens in float64.

    Once a forward has ended every expert is run on all of its tokens, one after the other: memory
    stays that of one expert's outputs, [tokens of a batch, H].

    Args:
        module: The experts.
        experts: E.
        hidden: H.
        device: Where sums are kept.
    """

    def __init__(self, module: nn.Module, experts: int, hidden: int, device: torch.device) -> None:
        self.module = module
        self.total = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
        self.count = 0
        self.hidden = torch.zeros(0)

    def begin(self, hidden: torch.Tensor, entered: torch.Tensor) -> None:
        """See `ForwardSum`."""
        self.hidden = hidden

    def end(self) -> None:
        """See `ForwardSum`."""
        hidden, self.hidden = self.hidden, self.hidden[:0]
        for expert in range(self.total.shape[0]):
            y = run_expert(self.module, expert, hidden)
            self.total[expert] += y.sum(0, dtype=torch.float64)
        self.count += hidden.shape[0]

    def value(self) -> torch.Tensor:
        """See `Sum`."""
        return (self.total / max(self.count, 1)).float().cpu()
