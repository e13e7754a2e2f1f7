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
        self._dtype = dtype
        self.in_features = in_features
        self.out_features = out_features

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in], multiplied out.

        For modelling code that reads a linear layer's matrix beside calling it: its dtype, or to
        multiply by hand (Mamba's step sizes).
        """
        weight = self.bank().materialise(0)[0]
        if weight is None:
            owned = next(self.parameters(), None)
            device = None if owned is None else owned.device
            weight = torch.zeros(self.out_features, self.in_features, device=device)
            weight = weight.to(self._dtype)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], None without one."""
        return self.bank().materialise(0)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x [..., in]`` to ``[..., out]``."""
        bank = self.bank()
        rows = x.reshape(-1, self.in_features)
        if bank.terms:
            rows = rows.to(bank.terms[0].dtype)
        return bank.apply(rows, 0).reshape(*x.shape[:-1], self.out_features)
