"""What a router gives every token: the second moment of its logits; what it can be asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UserError
from ..models.rerouter import Rerouter
from ..models.routing import find_router
from .needs import Need, RoutedOutputs, RouterLogits
from .values import Moment

if TYPE_CHECKING:
    from ..models import BankSite


def check_needs(layer: nn.Module, sites: Mapping[str, BankSite], needs: Iterable[Need]) -> None:
    """Refuses what a layer's router cannot tell, before any weight is read.

    Args:
        layer: The decoder layer, filled or on meta.
        sites: Its bank sites by name.
        needs: What is asked of it.

    Raises:
        UserError: It is not known how the layer routes.
    """
    for need in needs:
        if isinstance(need, RouterLogits):
            logit_weight(layer, sites)
        elif isinstance(need, RoutedOutputs):
            Rerouter(layer, sites)


def logit_weight(layer: nn.Module, sites: Mapping[str, BankSite] | None = None) -> str:
    """The path, in a decoder layer, of the matrix [E, H] whose outputs are the router's logits.

    Args:
        layer: The layer, filled or on meta.
        sites: Its bank sites, if they are known.

    Raises:
        UserError: There is none, or more than one.
    """
    router = find_router(layer, sites)
    rows = [] if router is None else [path for path, dim in router.tensors.items() if dim == 0]
    found = [path for path in rows if _tensor(layer, path).dim() == 2]
    if len(found) != 1:
        raise UserError(
            f"{type(layer).__name__}: cannot tell its router's logits: {len(found)} matrices with "
            "a row for each expert"
        )
    return found[0]


def _tensor(layer: nn.Module, path: str) -> torch.Tensor:
    module, _, name = path.rpartition(".")
    return getattr(layer.get_submodule(module), name)


class LogitMoment:
    """Accumulates Σ l lᵀ of the router's logits l [E] in float32, over all tokens.

    Logits are the products with the router's matrix, with its bias if it has one and before any
    softmax, sigmoid or correction bias: what a router's module returns differs from family to
    family.

    Args:
        layer: The decoder layer, filled.
        sites: Its bank sites by name.
        device: Where the sum is kept.
    """

    def __init__(
        self, layer: nn.Module, sites: Mapping[str, BankSite], device: torch.device
    ) -> None:
        path = logit_weight(layer, sites)
        router = find_router(layer, sites)
        assert router is not None
        self.experts = router.experts  # rows behind theirs are of what else the router serves
        self.module = layer.get_submodule(path.rpartition(".")[0])
        self.name = path.rpartition(".")[2]
        self.total = torch.zeros(1, self.experts, self.experts, dtype=torch.float32, device=device)
        self.count = torch.zeros(1, dtype=torch.int64)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the router's forward."""
        hidden = args[0] if args else kwargs["hidden_states"]
        weight = getattr(module, self.name)[: self.experts]
        bias = getattr(module, "bias", None)
        bias = None if bias is None else bias[: self.experts]
        x = hidden.detach().reshape(-1, weight.shape[1]).float()
        logits = F.linear(x, weight.float(), None if bias is None else bias.float())
        self.total[0].addmm_(logits.T, logits)
        self.count += logits.shape[0]

    def value(self) -> Moment:
        """See `Sum`."""
        return Moment(self.total.cpu(), self.count)
