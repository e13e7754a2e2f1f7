"""One expert on rows of our choosing, whatever its router thinks of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .expert_list import LIST_OBSERVER, TermExpertList
from .experts import observe
from .list_layout import ACTIVATION, linears


@torch.no_grad()
def run_expert(module: nn.Module, number: int, x: Tensor) -> Tensor:
    """Runs one expert of an experts module or a list of experts; no listener hears of it.

    An experts module runs by its own forward, every row routed to that expert with weight 1: its
    layout, biases, limits and norms are its own. Hooks on modules are passed over.

    Args:
        module: The experts, original or compressed.
        number: Which of them.
        x: Rows, ``[n, H]``.

    Returns:
        Its outputs before routing weights, ``[n, H]``.

    Raises:
        ValueError: The module would not run by our loop; see `experts.observe`.
    """
    if isinstance(module, TermExpertList):
        listener = getattr(module, LIST_OBSERVER, None)
        setattr(module, LIST_OBSERVER, None)
        try:
            return module.forward(x, number)
        finally:
            setattr(module, LIST_OBSERVER, listener)
    if isinstance(module, nn.ModuleList):
        expert = module[number]
        layers = linears(expert)
        assert layers is not None
        # What `list_layout` has tried it out to be, past the hooks on its layers.
        gate, up = (F.linear(x, layers[p].weight, layers[p].bias) for p in ("gate", "up"))
        h = getattr(expert, ACTIVATION)(gate) * up
        return F.linear(h, layers["down"].weight, layers["down"].bias)
    index = torch.full((x.shape[0], 1), number, dtype=torch.int64, device=x.device)
    with observe(module, _deaf):
        return module.forward(x, index, x.new_ones(index.shape))


def _deaf(*_: Any) -> None:
    """Takes the place of an observer."""
