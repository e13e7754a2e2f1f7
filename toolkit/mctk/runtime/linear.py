"""Linear layers as sums of terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..terms import BankShape
from .owner import LINEAR, TermModule


class TermLinear(TermModule):
    """Stands for an `nn.Linear`; a bias is a `Bias` term.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        specs: The specs of its terms.
        dtype: What floating tensors are loaded in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        specs: Sequence[Mapping[str, Any]],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = BankShape(1, out_features, in_features)
        super().__init__({LINEAR: shape}, {LINEAR: specs}, dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x [..., in]`` to ``[..., out]``."""
        bank = self.bank()
        rows = x.reshape(-1, self.in_features)
        if bank.terms:
            rows = rows.to(bank.terms[0].dtype)
        return bank.apply(rows, 0).reshape(*x.shape[:-1], self.out_features)
