"""Time and quality of `metric_svd` beside two other ways to the same factors.

    OMP_NUM_THREADS=1 python benchmarks/linalg.py                # about a minute on one core
    OMP_NUM_THREADS=1 python benchmarks/linalg.py --width 1024   # the figures' usual shapes, longer

The others are

- *cholesky + svd*: what good code does: Cholesky in float64, full SVD of ``W S`` in float32, a
  triangular solve;
- *published*: the procedure of the D²-MoE code, written anew: eigenvalues of the moment to see
  that they are positive, Cholesky, the factor stored in bfloat16, ``W S`` in bfloat16, full SVD,
  the factor's inverse.

Within one run all of them take turns, and a ratio is taken in each round: times on a shared
machine drift, ratios hardly do. With one thread the time is the processor's, which other jobs
disturb less than the wall clock's. Printed are medians [smallest-largest]. All get the same float32
moment; on the wide shape a second row has `metric_svd` on the outputs' moment, as it is when the
engine has collected that. *Excess* is the loss over the optimum, ``loss / optimum - 1``, both
from the tokens in float64; factors are in float32, before rounding to a storage dtype. Two kinds
of synthetic tokens: a power law with three massive channels, and condition 1e10.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from mctk.linalg import metric_svd, square_root
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def tokens(kind: str, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns synthetic inputs ``[count, width]`` in float64."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.double()
    if kind == "power law":
        spread = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    else:
        spread = torch.logspace(0, -5, width, dtype=torch.float64)
    x = (torch.randn(count, width, generator=generator).double() * spread) @ basis.t()
    if kind == "power law":
        x[:, :3] *= 100
    return x


def cholesky_svd(weight: Tensor, moment: Tensor, rank: int) -> Factors:
    """Whitening done well: float64 factor, float32 full SVD, triangular solve."""
    root = square_root(moment.double())
    U, S, Vh = torch.linalg.svd(weight @ root.factor.float(), full_matrices=False)
    return U[:, :rank] * S[:rank], root.divide(Vh[:rank].double()).float()


def published(weight: Tensor, moment: Tensor, rank: int) -> Factors:
    """The procedure of the published code."""
    matrix = moment.double()
    matrix = (matrix + matrix.t()) / 2
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    if float(eigenvalues.min()) <= 0:
        matrix = vectors @ torch.diag(eigenvalues.clamp(min=1e-5)) @ vectors.t()
    factor = torch.linalg.cholesky(matrix + 1e-6 * torch.eye(len(matrix), dtype=matrix.dtype))
    factor = factor.bfloat16()
    scaled = (weight.bfloat16() @ factor).float()
    U, S, Vh = torch.linalg.svd(scaled, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, (root[:, None] * Vh[:rank]) @ torch.linalg.inv(factor.float())


def in_turns(
    candidates: dict[str, Callable[[], Factors]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Factors]]:
    """Returns each candidate's seconds in each round, and its factors.

    The first candidate is called once unmeasured, to load the libraries.

    Rounds alternate the order, so that nobody always runs on a cache that another has warmed.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    results: dict[str, Factors] = {}
    next(iter(candidates.values()))()
    for turn in range(repeats):
        names = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]
        for name in names:
            start = clock()
            results[name] = candidates[name]()
            seconds[name].append(clock() - start)
    return seconds, results


def spread(values: list[float], digits: str = ".2f") -> str:
    """Returns ``median [smallest-largest]``."""
    middle = statistics.median(values)
    return f"{middle:{digits}} [{min(values):{digits}}-{max(values):{digits}}]"


def compare(shape: tuple[int, int], kind: str, fraction: float, repeats: int, seed: int) -> None:
    """Prints the table of one shape and kind of tokens."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    weight = (0.02 * torch.randn(m, n, generator=generator)).bfloat16().float()
    x = tokens(kind, n, 4 * n, generator)
    moment = (x.t() @ x).float()
    rank = int(fraction * min(m, n))
    candidates: dict[str, Callable[[], Factors]] = {
        "metric_svd": lambda: metric_svd(weight, input_moment=moment).factors(rank),
        "cholesky + svd": lambda: cholesky_svd(weight, moment, rank),
        "published": lambda: published(weight, moment, rank),
    }
    if m < n:
        outputs = x @ weight.double().t()
        output_moment = (outputs.t() @ outputs).float()
        candidates["metric_svd, outputs"] = lambda: metric_svd(
            weight, output_moment=output_moment
        ).factors(rank)
    seconds, results = in_turns(candidates, repeats)

    # X = Q R: the loss over the tokens is that over the rows of R.
    triangle = torch.linalg.qr(x, mode="r").R
    singular = torch.linalg.svdvals(weight.double() @ triangle.t())
    optimum = float(singular[rank:].square().sum())
    print(f"\n{m} x {n}, rank {rank}, {kind}")
    print(f"  {'':20} {'seconds':24} {'times metric_svd':24} excess")
    for name in candidates:
        U, V = results[name]
        error = (weight.double() - U.double() @ V.double()) @ triangle.t()
        excess = float(error.square().sum()) / optimum - 1
        ratios = [a / b for a, b in zip(seconds[name], seconds["metric_svd"], strict=True)]
        print(f"  {name:20} {spread(seconds[name], '.3f'):24} {spread(ratios):24} {excess:.1e}")


def main() -> None:
    """Parses the arguments and prints all tables."""
    parser = argparse.ArgumentParser(description="Time and excess loss of metric_svd.")
    parser.add_argument("--width", type=int, default=512, help="the smaller side")
    parser.add_argument("--ratio", type=float, default=3.5, help="larger side / smaller side")
    parser.add_argument("--rank", type=float, default=0.39, help="rank / smaller side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    large = int(arguments.width * arguments.ratio)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for shape in ((large, arguments.width), (arguments.width, large)):
        for kind in ("power law", "condition 1e10"):
            compare(shape, kind, arguments.rank, arguments.repeats, arguments.seed)


if __name__ == "__main__":
    main()
