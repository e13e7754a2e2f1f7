"""Linear layers whose matrices are read by the code around them are no banks."""

from __future__ import annotations

import pytest
import torch
from mctk.models import bank_sites
from mctk.models.usage import reads_matrix
from mctk.runtime import TermLinear
from mctk.terms import BankShape, Dense
from torch import nn

from tests.families import tiny


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "asked", "read", "added", "handed", "compared", "split"):
            setattr(self, name, nn.Linear(3, 3))
        self.called.weight.data.zero_()  # initialisation reads all it likes


class _Inner(_Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.asked(self.called(x.to(self.asked.weight.dtype)))
        if self.compared.bias is not None:
            x = self.compared(x)
        if x.dim() > 2:
            x = x @ self.split.weight.T
        else:
            x = self.split(x)
        x = self.read.weight @ x.T - self.added.bias.float()[:, None]
        return _fused(x, weight=self.handed.weight)


def _fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight @ x


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Inner()
        self.made = type("_Made", (nn.Module,), {})()  # a class without source
        self.made.linear = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("inner.called", False),
        ("inner.asked", False),
        ("inner.read", True),
        ("inner.added", True),
        ("inner.handed", False),
        ("inner.compared", False),
        ("inner.split", False),
        ("made.linear", False),
    ],
)
def test_code_that_reads_a_matrix(path, read):
    assert reads_matrix(_Outer(), path) is read


def test_what_reads_of_a_base_class_counts():
    class Derived(_Inner):
        pass

    outer = _Outer()
    outer.inner = Derived()
    assert reads_matrix(outer, "inner.read")


def test_the_step_sizes_of_a_selective_scan_are_no_bank():
    layer = tiny("jamba").model.layers[0]
    assert isinstance(layer.mamba.dt_proj, nn.Linear)
    names = bank_sites(layer)
    assert "mamba.dt" not in names
    assert {"mamba.in", "mamba.x", "mamba.out"} <= set(names)


def test_a_compressed_layer_says_of_what_kind_its_matrix_is():
    term = Dense(BankShape(1, 5, 6), [0], torch.ones(1, 5, 6, dtype=torch.bfloat16))
    linear = TermLinear(6, 5, [term.spec()], torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.shape == (5, 6)
    assert "weight" not in linear.state_dict()
    linear.set_terms("linear", [term])
    assert torch.equal(linear.weight, term.weight[0])
    assert TermLinear(6, 5, [], torch.bfloat16).weight.dtype == torch.bfloat16
