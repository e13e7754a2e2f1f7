"""How experts that are modules in an `nn.ModuleList` are laid out: by names, then tried out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..terms import BankShape

NAMES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
"""What the linear layers of an expert are called; the second names are Mixtral's."""
ACTIVATION = "act_fn"


def linears(expert: nn.Module) -> dict[str, nn.Linear] | None:
    """The gate, up and down layers of an expert; None if it does not have the three."""
    found = {}
    for part, names in NAMES.items():
        layers = [getattr(expert, name, None) for name in names]
        layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len(layers) != 1:
            return None
        found[part] = layers[0]
    return found


def list_layout(module: nn.ModuleList) -> tuple[dict[str, BankShape], bool]:
    """The shapes of an original list's banks, and whether its matrices have biases.

    Raises:
        ValueError: The experts are not equal gated MLPs; says what is wrong.
    """
    first, *others = module
    for number, expert in enumerate(others, 1):
        if type(expert) is not type(first) or _shapes(expert) != _shapes(first):
            raise ValueError(f"expert {number} differs from expert 0 in class or shapes")
    layers = linears(first)
    if layers is None:
        raise ValueError(f"{type(first).__name__} has no linear layers named as {NAMES}")
    known = {*layers.values()}
    activation: Any = getattr(first, ACTIVATION, None)
    for name, child in first.named_children():
        if child not in known and (
            child is not activation or any(True for _ in child.parameters())
        ):
            raise ValueError(f"{type(first).__name__} holds {name} besides its three matrices")
    if any(True for _ in first.parameters(recurse=False)) or any(True for _ in first.buffers()):
        raise ValueError(f"{type(first).__name__} holds tensors besides its three matrices")
    if not callable(activation):
        raise ValueError(f"{type(first).__name__} has no {ACTIVATION}")
    gate, up, down = (layers[part] for part in NAMES)
    shape = BankShape(len(module), up.out_features, up.in_features)
    mirrored = (shape.in_features, shape.out_features)
    if gate.weight.shape != up.weight.shape or tuple(down.weight.shape) != mirrored:
        raise ValueError(f"{type(first).__name__}: its matrices do not fit together")
    if len({layer.bias is None for layer in layers.values()}) > 1:
        raise ValueError(f"{type(first).__name__}: only some of its matrices have a bias")
    if not _computes_gated_mlp(first):
        raise ValueError(
            f"{type(first).__name__} does not compute down({ACTIVATION}(gate(x)) * up(x))"
        )
    down_shape = BankShape(len(module), *mirrored)
    return {"gate": shape, "up": shape, "down": down_shape}, gate.bias is not None


def _shapes(expert: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in expert.named_parameters()}


def _computes_gated_mlp(expert: nn.Module) -> bool:
    """Runs the class's own forward on tiny matrices and compares: names alone may mislead."""
    generator = torch.Generator().manual_seed(0)
    layers = linears(expert)
    assert layers is not None
    tiny = copy.copy(expert)
    tiny._modules = dict(expert._modules)
    made: dict[str, nn.Linear] = {}
    for name, child in expert.named_children():
        part = next((part for part, layer in layers.items() if layer is child), None)
        if part is None:
            continue
        sizes = (3, 5) if part == "down" else (5, 3)
        weight = torch.randn(sizes, generator=generator, dtype=torch.float64, device="cpu")
        made[part] = nn.Linear(sizes[1], sizes[0], bias=False, device="meta", dtype=torch.float64)
        made[part].weight = nn.Parameter(weight, requires_grad=False)
        tiny._modules[name] = made[part]
    x = torch.randn((4, 3), generator=generator, dtype=torch.float64, device="cpu")
    activation = getattr(expert, ACTIVATION)
    try:
        with torch.no_grad():
            own = type(expert).forward(tiny, x)
            ours = made["down"](activation(made["gate"](x)) * made["up"](x))
    except Exception:  # foreign code: whatever it needs that we do not know
        return False
    return isinstance(own, Tensor) and own.shape == ours.shape and bool(torch.allclose(own, ours))
