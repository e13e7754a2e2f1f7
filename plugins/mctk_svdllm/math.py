"""SVD-LLM's closed-form update: U fitted anew to what the compressed prefix passes on."""

from __future__ import annotations

from mctk.decompose import Truncatable
from mctk.linalg import update_left
from torch import Tensor


class UpdatedSVD:
    """A truncation in one metric whose U is the best for its V in another.

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
