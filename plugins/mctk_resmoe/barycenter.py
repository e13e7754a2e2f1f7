"""The free-support Wasserstein barycenter of experts as sets of neurons (arXiv 2503.06881).

An expert is a uniform measure on its I neurons: points that join a row of gate, the same row of up
and the same column of down, ``[3H]`` (``[2H]`` without a gate). Between two such measures of equal
size an optimal transport is a permutation, so the barycenter with I support points alternates two
steps, neither of which can raise the objective ``Σ_e ‖T_e W_e − W_c‖²``: the best permutation T_e
of every expert, an exact assignment, and the support's best place, the mean of the aligned experts.
The paper's proposition says that this objective's minimum is the barycenter; its authors' code has
the iteration from POT's `free_support_barycenter` and the last T_e from `get_optimal_permutation`.

Experts are mappings from part to matrices: gate and up ``[E, I, H]``, down ``[E, H, I]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import torch
from mctk.linalg import match, reorder
from torch import Tensor


@dataclass(frozen=True)
class Barycenter:
    """A barycenter, and how the experts lie on it.

    Attributes:
        support: Its matrices by part, float32: gate, up ``[I, H]``, down ``[H, I]``.
        order: Neuron ``order[e, i]`` of expert e lies on support point i, int64 ``[E, I]``.
        objective: ``Σ_e ‖T_e W_e − W_c‖²`` after each iteration, never rising.
        start: The expert whose neurons the support began with.
    """

    support: dict[str, Tensor]
    order: Tensor
    objective: list[float]
    start: int


def barycenter(
    experts: Mapping[str, Tensor],
    start: int = 0,
    iterations: int = 100,
    tolerance: float = 1e-7,
    workers: int = 1,
) -> Barycenter:
    """Finds a local optimum of the barycenter from one expert's neurons.

    Alternating assignment and mean (arXiv 2503.06881; POT's `free_support_barycenter` with uniform
    weights, whose defaults are the same iterations and tolerance).

    Args:
        experts: All experts' matrices by part.
        start: The expert to begin with; it decides which local optimum is found.
        iterations: At most so many.
        tolerance: Stops once the support moves by less than this, a sum of squares.
        workers: How many assignments are solved at once; each holds ``I²`` float64.

    Raises:
        ValueError: A weight is not finite.
    """
    _check_finite(experts)
    support = {part: weight[start].float() for part, weight in experts.items()}
    members = range(next(iter(experts.values())).shape[0])
    found: Barycenter | None = None
    with ThreadPoolExecutor(workers) as pool:  # scipy solves without holding Python's lock
        for _ in range(iterations):
            order = torch.stack(list(pool.map(_assign, repeat(support), repeat(experts), members)))
            moved = mean(experts, order)
            value = objective(experts, order, moved)
            if found is not None and value > found.objective[-1]:
                break  # the float32 products that assignments compare are no finer than this
            path = [value] if found is None else [*found.objective, value]
            found = Barycenter(moved, order, path, start)
            shift = sum(squared(moved[part] - support[part]) for part in support)
            if shift < tolerance:
                break
            support = moved
    assert found is not None
    return found


def best_barycenter(
    experts: Mapping[str, Tensor], iterations: int, tolerance: float, workers: int
) -> Barycenter:
    """The best of the local optima that the experts lead to, one start each; ties to the first."""
    count = next(iter(experts.values())).shape[0]
    tried = (barycenter(experts, e, iterations, tolerance, workers) for e in range(count))
    return min(tried, key=lambda found: found.objective[-1])


def mean(experts: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The mean of the aligned experts by part, float32; of equal experts it is that one exactly."""
    found = {}
    for part, weight in experts.items():
        total = torch.zeros(weight.shape[1:], dtype=torch.float64, device=weight.device)
        for e in range(weight.shape[0]):
            total += aligned(weight, part, order, e)
        found[part] = (total / weight.shape[0]).float()
    return found


def objective(experts: Mapping[str, Tensor], order: Tensor, support: Mapping[str, Tensor]) -> float:
    """``Σ_e ‖T_e W_e − W_c‖²`` over all parts, in float64; the authors' code divides by E."""
    return sum(
        squared(aligned(weight, part, order, e).float() - support[part])
        for part, weight in experts.items()
        for e in range(weight.shape[0])
    )


def aligned(weight: Tensor, part: str, order: Tensor, expert: int) -> Tensor:
    """Returns an expert's matrix ``[out, in]`` of a bank's ``[E, out, in]`` in its new order."""
    own = slice(expert, expert + 1)
    return reorder(weight[own], part, order[own])[0]


def _assign(support: Mapping[str, Tensor], experts: Mapping[str, Tensor], expert: int) -> Tensor:
    """The neuron of an expert for each support point, ``[I]``: least sum of squared distances.

    Norms are the same under every permutation, so it is the largest sum of inner products.
    """
    return match(support, {part: weight[expert] for part, weight in experts.items()})


def _check_finite(experts: Mapping[str, Tensor]) -> None:
    for weight in experts.values():
        for e in range(weight.shape[0]):
            if not bool(weight[e].isfinite().all()):
                raise ValueError(f"expert {e} holds NaN or infinity")


def squared(matrix: Tensor) -> float:
    """The sum of squares of a float32 matrix, added up in float64."""
    return float(matrix.square().sum(dtype=torch.float64))
