"""How alike experts are: linear CKA of their outputs, spectra of their matrices and deltas.

Letters: E experts, n tokens, H hidden size, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..terms import Bank

EXACT = 1024  # smaller side of a matrix up to which every expert of every layer is taken
EXPERTS = 2  # experts of a layer, and
LAYERS = 8  # layers, beyond
GRID = 65  # points of a curve


def cka_tokens(experts: int, most: int = 1024, memory: int = 256 << 20) -> int:
    """How many tokens' Gram matrices, one an expert, fit into some memory [bytes]."""
    return min(most, math.isqrt(memory // (4 * max(1, experts))))


def linear_cka(outputs: Callable[[int], torch.Tensor], experts: int) -> torch.Tensor:
    """Linear CKA between every two experts (Kornblith et al. 2019, arXiv 1905.00414, eq. 4-5).

    With fewer tokens than features the plain estimator tends to 1 whatever the experts do, so HSIC
    is taken by its unbiased estimator (Song et al. 2012, eq. 5): with K the Gram matrix of an
    expert's outputs, its diagonal zero,

        HSIC(K, L) ∝ tr(K L) + 1ᵀK1 · 1ᵀL1 / ((n-1)(n-2)) - 2/(n-2) · 1ᵀK L 1

    Args:
        outputs: Expert → its outputs on the same n tokens, [n, H].
        experts: E.

    Returns:
        float64 [E, E], 1 on the diagonal; NaN for an expert whose outputs do not vary, and for all
        below 4 tokens.
    """
    grams, sums = [], []
    tokens = 0
    for expert in range(experts):
        y = outputs(expert).float()
        tokens = y.shape[0]
        y = y - y.mean(0)  # changes nothing but the rounding
        gram = y @ y.T
        gram.fill_diagonal_(0)
        gram /= gram.norm().clamp(min=torch.finfo(torch.float32).tiny)  # as scale does not count
        sums.append(gram.double().sum(1).cpu())
        grams.append(gram.flatten().cpu())
    if tokens < 4 or not grams:
        return torch.full((experts, experts), math.nan, dtype=torch.float64)
    flat, row = torch.stack(grams), torch.stack(sums)  # [E, n²], [E, n]
    total = row.sum(1)
    hsic = (flat @ flat.T).double()
    hsic += total[:, None] * total / ((tokens - 1) * (tokens - 2))
    hsic -= 2 / (tokens - 2) * (row @ row.T)
    own = hsic.diagonal()
    own = torch.where(own > 1e-6, own, math.nan)
    return hsic / (own[:, None] * own).sqrt()


def energy_kept(matrix: torch.Tensor) -> torch.Tensor:
    """Share of the squared singular values that the r largest hold, on an even grid of r.

    Args:
        matrix: [out, in].

    Returns:
        float64 [GRID] for r from 0 to the full rank; 1 everywhere for a zero matrix.
    """
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    small = small.double() if small.shape[0] <= EXACT else small.float()
    values = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp(min=0).double().cpu()
    total = values.sum()
    if not total > 0:
        return torch.ones(GRID, dtype=torch.float64)
    held = torch.cat([torch.zeros(1, dtype=torch.float64), values.cumsum(0)]) / total
    place = torch.linspace(0, values.numel(), GRID, dtype=torch.float64)
    low = place.floor().long().clamp(max=values.numel() - 1)
    return held[low] + (place - low) * (held[low + 1] - held[low])


def bank_spectra(bank: Bank, tokens: Sequence[float], layers: int) -> dict[str, object] | None:
    """Curves of one bank: its experts', and those of what a base leaves of them.

    The base is the mean of the experts weighted by the tokens routed to them. Of large matrices
    only some experts of some layers are taken, evenly chosen: an eigenvalue problem costs the cube.

    Args:
        bank: A layer's gate, up or down, of original matrices.
        tokens: Routed to each expert, [E].
        layers: How many the model has.

    Returns:
        "experts" and "deltas" (mean curves, [GRID]), "delta_energy" (Σ‖Δ‖² / Σ‖W‖²) and "matrices"
        (how many); None if the bank is not among the chosen.
    """
    shape = bank.shape
    chosen: range | list[int] = range(shape.members)
    if min(shape.out_features, shape.in_features) > EXACT:
        if bank.layer not in evenly(layers, LAYERS):
            return None
        chosen = evenly(shape.members, EXPERTS)
    weights = torch.tensor(list(tokens), dtype=torch.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else weights.fill_(1 / shape.members)
    base: torch.Tensor | None = None
    for member in range(shape.members):
        part = _matrix(bank, member).float() * float(weights[member])
        base = part if base is None else base.add_(part)
    if base is None:
        return None
    experts, deltas = (torch.zeros(GRID, dtype=torch.float64) for _ in range(2))
    before = after = 0.0
    for member in chosen:
        matrix = _matrix(bank, member).float()
        experts += energy_kept(matrix)
        before += float(matrix.double().square().sum())
        matrix = matrix - base
        deltas += energy_kept(matrix)
        after += float(matrix.double().square().sum())
    return {
        "layer": bank.layer,
        "experts": (experts / len(chosen)).tolist(),
        "deltas": (deltas / len(chosen)).tolist(),
        "delta_energy": after / before if before else 0.0,
        "matrices": len(chosen),
    }


def evenly(count: int, most: int) -> range | list[int]:
    """At most so many positions out of `count`, the first and the last among them."""
    if count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _matrix(bank: Bank, member: int) -> torch.Tensor:
    weight, _ = bank.materialise(member)
    if weight is None:
        raise ValueError(f"{bank.name} of layer {bank.layer}: member {member} has no matrix")
    return weight
