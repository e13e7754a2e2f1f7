"""Square roots of second moments: ``C = S Sᵀ``, and products with ``S`` and ``S⁻¹``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mctk.linalg.products import transposed_lower_product

FIRST_DAMPING = 1e-10
LAST_DAMPING = 1e-6
EIGENVALUE_CUT = 1e-12


@dataclass(frozen=True)
class Root:
    """A square root ``S [n, n]`` of a second moment.

    Attributes:
        factor: ``S``, float64.
        damping: What was added to the moment's diagonal, relative to its mean; 0.0 if nothing.
        eigenvalues: ``[n]`` where S is eigenvectors times square roots of eigenvalues; None
            where S is a lower triangular Cholesky factor.
    """

    factor: Tensor
    damping: float
    eigenvalues: Tensor | None = None

    def times(self, matrix: Tensor) -> Tensor:
        """Returns ``Sᵀ matrix`` for a ``matrix [n, m]``."""
        if self.eigenvalues is None:
            return transposed_lower_product(self.factor, matrix)
        return self.factor.t() @ matrix

    def divide(self, rows: Tensor) -> Tensor:
        """Returns ``rows S⁻¹`` for ``rows [r, n]``; a triangular solve, never an inverse."""
        if self.eigenvalues is None:
            return torch.linalg.solve_triangular(self.factor, rows, upper=False, left=False)
        return (rows / self.eigenvalues) @ self.factor.t()


def square_root(moment: Tensor) -> Root:
    """Factors a symmetric positive semidefinite matrix ``[n, n]`` that may be singular.

    Cholesky of the moment damped by 1e-10 of its mean diagonal, ten times as much until it
    succeeds. What needs more than 1e-6 is not a second moment but for rounding errors: then the
    eigenvalues below 1e-12 of the largest, negative ones included, are raised to that.

    Args:
        moment: Float64, finite, not zero.
    """
    mean = float(moment.diagonal().mean())
    damping = FIRST_DAMPING
    while damping <= LAST_DAMPING * 1.5:
        damped = moment.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            return Root(factor, damping)
        damping *= 10
    eigenvalues, vectors = torch.linalg.eigh(moment)
    eigenvalues = eigenvalues.clamp(min=EIGENVALUE_CUT * float(eigenvalues[-1]))
    return Root(vectors * eigenvalues.sqrt(), 0.0, eigenvalues)
