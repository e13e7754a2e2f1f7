"""Truncated SVD of a weight in the metric of a second moment.

The best approximation of rank r to a layer's *output* minimises ``tr (W - W_r) C (W - W_r)ᵀ``
with ``C = Σ x xᵀ`` the second moment of its inputs (SVD-LLM calls it whitening). With
``C = S Sᵀ`` it has two equal forms:

- input side: V = top eigenvectors of ``Sᵀ Wᵀ W S``, ``W_r = (W S V) (Vᵀ S⁻¹)``;
- output side: U = top eigenvectors of ``A = W C Wᵀ``, the second moment of the outputs,
  ``W_r = U (Uᵀ W)``. No root, no inverse, no damping, and C may be singular.

The smaller side is taken, so that one symmetric eigenproblem of size ``min(m, n)`` gives the
whole spectrum and the factors of every rank. All of it runs in float64: in float32 the squares
lose the small singular values.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mctk.linalg.known import Directions, directions
from mctk.linalg.products import upper_product
from mctk.linalg.root import Root, square_root

# Eigenvalues of V C Vᵀ, scaled to a unit diagonal, below which a direction carries nothing.
_REFIT_CUT = 1e-12
# The same where C is another moment, of which V's directions may see nothing but rounding errors:
# moments are summed in float32.
_UPDATE_CUT = 1e-6


class MetricSVD:
    """The SVD of a weight in a metric; made by `metric_svd`.

    Attributes:
        spectrum: Squared singular values ``[min(m, n)]``, float64, descending: what keeping each
            direction adds, so dropping all from r on costs ``spectrum[r:].sum()``.
        damping: What was added to the diagonal of the input moment, relative to its mean; 0.0
            where no factor of it was needed.
        metric: ``"input"``, ``"output"`` or ``"plain"``, by the moment that was used.
    """

    def __init__(
        self,
        weight: Tensor,
        matrix: Tensor,
        found: Directions,
        metric: str,
        *,
        output_side: bool,
        moment: Tensor | None = None,
        root: Root | None = None,
    ) -> None:
        # Output side: W. Input side: Sᵀ Wᵀ. Rows are contiguous.
        self._weight = weight
        self._matrix = matrix
        self._output_side = output_side
        self._moment = moment
        self._root = root
        self.spectrum, self._vectors = found
        self.metric = metric
        self.damping = 0.0 if root is None else root.damping

    @torch.no_grad()
    def factors(
        self, rank: int, balance: bool = False, refit: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the optimal factors of a rank.

        Args:
            rank: From 0 (empty factors) to ``min(m, n)`` (the weight itself).
            balance: Share the singular values evenly: both factors are scaled by their square
                roots. The product is the same.
            refit: A storage dtype: V is rounded to it and U fitted anew to the rounded V,
                ``U = W C Vᵀ (V C Vᵀ)⁺``. V's rounding errors are the ones that large inputs
                magnify. The results still have the dtype below.

        Returns:
            ``U [m, r]`` and ``V [r, n]``, float64 if the weight is, float32 otherwise.

        Raises:
            ValueError: The rank is out of range, or a refit is asked for where only the output
                moment is known.
        """
        limit = min(self._weight.shape)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= limit:
            raise ValueError(f"rank must be an integer from 0 to {limit}, not {rank!r}")
        vectors = self._vectors[:rank]
        projected = vectors @ self._matrix
        if self._output_side:
            left, right = vectors.t(), projected
        else:
            left = projected.t()
            right = vectors if self._root is None else self._root.divide(vectors)
        if balance:
            sigma = self.spectrum[:rank].sqrt().sqrt()
            scale = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
            # All of sigma is in V on the output side, in U on the input side.
            scale = scale if self._output_side else 1 / scale
            left, right = left * scale, right / scale[:, None]
        if refit is not None:
            right = right.to(refit).double()
            left = self._fit_left(right)
        dtype = torch.float64 if self._weight.dtype == torch.float64 else torch.float32
        return left.to(dtype).contiguous(), right.to(dtype).contiguous()

    def _fit_left(self, right: Tensor) -> Tensor:
        """Returns the U ``[m, r]`` that is optimal for a given ``V [r, n]``."""
        if self.metric == "output":
            raise ValueError("refit needs the input moment; only the output moment was given")
        weighted = right if self._moment is None else right @ self._moment
        return _divide(self._weight.double() @ weighted.t(), weighted @ right.t(), _REFIT_CUT)


def _divide(products: Tensor, gram: Tensor, cut: float) -> Tensor:
    """Returns ``products [m, r]`` times the pseudo-inverse of a Gram matrix ``[r, r]``."""
    size = gram.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    inverse = torch.linalg.pinv(gram / size / size[:, None], rtol=cut, hermitian=True)
    return (products / size) @ inverse / size


@torch.no_grad()
def update_left(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    input_moment: Tensor | None = None,
    output_moment: Tensor | None = None,
) -> Tensor:
    """Fits U anew for given V in the metric of another moment C': the closed-form update.

    ``U ← U + (W - U V) C' Vᵀ (V C' Vᵀ)⁺``, which is ``W C' Vᵀ (V C' Vᵀ)⁻¹`` where C' sees every
    direction of V; in directions that it does not see U stays. Where U was optimal for V in the
    metric of C' already, nothing changes.

    Args:
        weight: ``W [m, n]``.
        left: ``U [m, r]``. With an output moment, as `MetricSVD.factors` gives it on the output
            side: its columns are orthogonal and V is ``U⁺ W``.
        right: ``V [r, n]``.
        input_moment: ``C' [n, n]``.
        output_moment: ``W C' Wᵀ [m, m]``.

    Returns:
        ``U [m, r]``, in U's dtype; unchanged if the moment is all zeros.

    Raises:
        ValueError: A moment has a wrong shape or holds NaN or infinity, or there is not one.
    """
    if (input_moment is None) == (output_moment is None):
        raise ValueError("give either the input moment or the output moment")
    outputs, own = weight.double(), left.double()
    if input_moment is not None:
        moment = _checked(input_moment, weight.shape[1], "input moment", weight.device)
        if moment is None:
            return left
        factor = right.double()
        weighted = factor @ moment
        lost = outputs @ weighted.t() - own @ (factor @ weighted.t())
        return (own + _divide(lost, weighted @ factor.t(), _UPDATE_CUT)).to(left.dtype)
    assert output_moment is not None
    moment = _checked(output_moment, weight.shape[0], "output moment", weight.device)
    if moment is None:
        return left
    norms = own.square().sum(0)
    projector = own.t() / torch.where(norms > 0, norms, torch.ones_like(norms))[:, None]  # V = P W
    seen = moment @ projector.t()
    gram = projector @ seen
    return (own + _divide(seen - own @ gram, gram, _UPDATE_CUT)).to(left.dtype)


@torch.no_grad()
def metric_svd(
    weight: Tensor, *, input_moment: Tensor | None = None, output_moment: Tensor | None = None
) -> MetricSVD:
    """Decomposes a weight in the metric of at most one second moment.

    Moments are un-normalised sums in any floating dtype; their scale scales the spectrum and
    changes no product ``U V``. A moment of zeros (nothing was seen) gives the plain SVD. Where
    the input moment is singular the product is one of several optima: compare outputs, not
    entries.

    Args:
        weight: ``W [m, n]``.
        input_moment: ``Σ x xᵀ [n, n]``.
        output_moment: ``Σ (W x)(W x)ᵀ [m, m]``, of the outputs of this very weight.

    Returns:
        The decomposition; ``factors(rank)`` gives any rank of it.

    Raises:
        ValueError: A shape is wrong, both moments are given, or a tensor holds NaN or infinity.
    """
    if input_moment is not None and output_moment is not None:
        raise ValueError("give the input moment or the output moment, not both")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [m, n]")
    m, n = weight.shape
    weight = weight.detach()
    if not bool(weight.isfinite().all()):
        raise ValueError("weight contains NaN or infinity")
    moment, metric, root, count = None, "plain", None, min(m, n)
    if output_moment is not None:
        outputs = _checked(output_moment, m, "output moment", weight.device)
        if outputs is not None:
            kind = f"output, {count}"
            found = directions(kind, (output_moment,), partial(_largest, outputs, count))
            return MetricSVD(weight, weight.double(), found, "output", output_side=True)
    elif input_moment is not None:
        moment = _checked(input_moment, n, "input moment", weight.device)
        metric = "plain" if moment is None else "input"
    of = (weight,) if input_moment is None or moment is None else (weight, input_moment)
    if m <= n:
        matrix = weight.double()
        found = directions(metric, of, lambda: _largest(_gram(matrix, moment), count))
        return MetricSVD(weight, matrix, found, metric, output_side=True, moment=moment)
    matrix = weight.t().contiguous().double()
    if moment is not None:
        root = square_root(moment)
        matrix = root.times(matrix)
    found = directions(metric, of, lambda: _largest(_gram(matrix, None), count))
    return MetricSVD(weight, matrix, found, metric, output_side=False, moment=moment, root=root)


def _gram(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """The upper triangle of ``M C Mᵀ``, C the identity where no moment is given."""
    return upper_product(matrix if moment is None else matrix @ moment, matrix)


def _largest(gram: Tensor, count: int) -> Directions:
    """The largest eigenvalues of a Gram matrix, descending, and their vectors.

    Args:
        gram: ``[k, k]``; its upper triangle counts.
        count: How many.

    Returns:
        ``[count]``, not negative, and one vector a row ``[count, k]``, so that those of any rank
        are contiguous.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram, UPLO="U")
    return eigenvalues.flip(0)[:count].clamp(min=0), vectors.t().flip(0)[:count]


def _checked(moment: Tensor, size: int, name: str, device: torch.device) -> Tensor | None:
    """Returns the moment in float64 and exactly symmetric, or None if it is all zeros."""
    if tuple(moment.shape) != (size, size):
        raise ValueError(f"{name} has shape {list(moment.shape)}, expected {[size, size]}")
    if not bool(moment.isfinite().all()):
        raise ValueError(f"{name} contains NaN or infinity")
    if bool((moment.diagonal() < 0).any()):
        raise ValueError(f"{name} has a negative diagonal: it is no sum of squares")
    if not bool(moment.any()):
        return None
    moment = moment.detach().to(device).double()
    return (moment + moment.t()) / 2


@torch.no_grad()
def loss(weight: Tensor, approx: Tensor, moment: Tensor | None = None) -> float:
    """Returns ``tr (W - W') C (W - W')ᵀ``, the squared error of the outputs, in float64.

    Args:
        weight: ``W [m, n]``.
        approx: ``W' [m, n]``.
        moment: Input moment ``C [n, n]``; None for the squared Frobenius norm.
    """
    difference = weight.double() - approx.double()
    weighted = difference if moment is None else difference @ moment.double()
    return max(float((weighted * difference).sum()), 0.0)
