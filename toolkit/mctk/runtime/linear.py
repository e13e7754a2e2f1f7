"""Linear layers as sums of terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..terms import Bank, BankShape
from .owner import LINEAR, TermModule


class _Product(Tensor):
    """A bank's only matrix: known by shape, dtype and device, computed where it is used."""

    _bank: Bank

    @staticmethod
    def __new__(cls: Any, bank: Bank, dtype: torch.dtype, device: torch.device) -> _Product:
        size = (bank.shape.out_features, bank.shape.in_features)
        product = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)
        product._bank = bank
        return product

    def multiplied(self) -> Tensor:
        """The matrix itself; zeros where no term has one."""
        weight = self._bank.materialise(0)[0]
        return (
            torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            if weight is None
            else weight
        )

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def real(value: Any) -> Any:
            return value.multiplied() if isinstance(value, cls) else value

        return function(*tree_map(real, args), **tree_map(real, kwargs or {}))


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
        """The matrix [out, in], multiplied out when something is done with it.

        For modelling code that reads what a linear layer's matrix is beside calling the layer, such
        as its dtype in each forward.
        """
        owned = next(self.parameters(), None)
        device = torch.device("cpu") if owned is None else owned.device
        return _Product(self.bank(), self._dtype, device)

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
