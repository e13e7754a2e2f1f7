"""What a layer's output loses without some experts, from inner products alone.

All experts' outputs y_e are computed once. A subset of the experts is then only another routing,
and the changed output's distance from what the layer should give follows from the inner products of
the y_e: no subset runs an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mctk.statistics import RoutedSample
from torch import Tensor

_BLOCK = 4096  # tokens at a time


class SubsetLoss:
    """``‖Z − Z'‖_F²`` over the sample's tokens, of keeping some experts.

    The square of the reconstruction loss of NAEE, section 3.2, which orders subsets alike; there
    every subset runs the layer anew.

    With w' the routing weights among the kept experts, w those among the present ones and
    ``c = w' − w``, a token's error is ``Σ_ef c_e c_f G_ef + 2 Σ_e c_e y_e · (z₀ − z) + ‖z₀ − z‖²``,
    z₀ the present experts' sum and z the target: so what does not change adds no rounding.

    Args:
        sample: What was measured.
        present: The experts that there are, ascending.

    Attributes:
        top: k, how many experts a token chooses.
        whole: The loss of keeping all that are present: zero, unless the target is another model's.
        energy: ``‖Z‖_F²``.
    """

    def __init__(self, sample: RoutedSample, present: Sequence[int]) -> None:
        self._gram = sample.gram
        self._route: Callable[[Sequence[int]], tuple[Tensor, Tensor]] = sample.route
        self._known: dict[tuple[int, ...], float] = {}
        self._index, self._weights = self._routed(present)
        self.top = self._index.shape[1]
        self.energy = float(sample.energy.double().sum())
        self._pull = torch.empty(sample.target.shape, dtype=torch.float64)
        whole = 0.0
        for rows in _blocks(self._index.shape[0]):
            index, weights = self._index[rows], self._weights[rows]
            target = sample.target[rows].double()
            columns = (
                self._gram[rows]
                .double()
                .gather(2, index[:, None, :].expand(-1, target.shape[1], -1))
            )
            sums = (columns * weights[:, None, :]).sum(2)
            self._pull[rows] = sums - target
            norms = (sums.gather(1, index) * weights).sum()
            crossed = (target.gather(1, index) * weights).sum()
            whole += float(norms - 2 * crossed + sample.energy[rows].double().sum())
        self.whole = max(whole, 0.0)

    def __call__(self, kept: Sequence[int]) -> float:
        """The loss of keeping these experts (ascending)."""
        key = tuple(kept)
        if key not in self._known:
            self._known[key] = self._compute(key)
        return self._known[key]

    def contributions(self) -> Tensor:
        """How much each expert's routed outputs weigh, ``Σ_t w_e² ‖y_e‖²``, float64 ``[E]``."""
        found = torch.zeros(self._gram.shape[1], dtype=torch.float64)
        norms = self._gram.diagonal(dim1=1, dim2=2).double().gather(1, self._index)
        energies = norms * self._weights.square()
        return found.index_add_(0, self._index.reshape(-1), energies.reshape(-1))

    def _routed(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        index, weights = self._route(kept)
        return index.to(self._gram.device), weights.to(self._gram.device).double()

    def _compute(self, kept: tuple[int, ...]) -> float:
        index, weights = self._routed(kept)
        changed = (index != self._index).any(1) | (weights != self._weights).any(1)
        total = self.whole
        for rows in changed.nonzero()[:, 0].split(_BLOCK):
            who = torch.cat([index[rows], self._index[rows]], dim=1)
            c = torch.cat([weights[rows], -self._weights[rows]], dim=1)
            products = self._gram[rows[:, None, None], who[:, :, None], who[:, None, :]].double()
            total += float(torch.einsum("ti,tij,tj->", c, products, c))
            total += 2 * float((c * self._pull[rows].gather(1, who)).sum())
        return max(total, 0.0)


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, tokens, _BLOCK)]
