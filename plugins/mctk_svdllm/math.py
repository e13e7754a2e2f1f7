"""SVD-LLM's closed-form update: U fitted anew to what the compressed prefix passes on.

The "layer-wise closed-form update" of arXiv 2403.07378v1, and `local_update` of the authors' code;
v5 of the paper tunes U and V by LoRA instead (section 3.2), which is not here.
"""

from __future__ import annotations

from mctk.decompose import Truncatable
from mctk.linalg import update_left
from torch import Tensor


class UpdatedSVD:
    """A truncation in one metric whose U is the best for its V in another.

    ``U = W C' Vᵀ (V C' Vᵀ)⁺`` with C' the moment of the compressed prefix's activations.

    Args:
        part: The decomposition of the matrix in the metric of the original's activations.
        weight: The matrix, ``[out, in]``.
        moment: Of the compressed prefix's activations: ``Σ x xᵀ [in, in]``, or of what the matrix
            makes of them, ``[out, out]``; all zeros changes nothing.
        side: Which of the two: "input" or "output".
    """

    def __init__(self, part: Truncatable, weight: Tensor, moment: Tensor, side: str) -> None:
        self._part, self._weight = part, weight
        self._moment = {f"{side}_moment": moment}

    @property
    def spectrum(self) -> Tensor:
        """Of the original's metric, in which V is chosen."""
        return self._part.spectrum

    def factors(self, rank: int, balance: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ``U [out, rank]`` and ``V [rank, in]``."""
        left, right = self._part.factors(rank, balance=balance)
        return update_left(self._weight, left, right, **self._moment), right
