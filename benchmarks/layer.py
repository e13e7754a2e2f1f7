"""Time of a compressed Mixture-of-Experts layer beside the original and a naive run time.

    OMP_NUM_THREADS=1 python benchmarks/layer.py                 # a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/layer.py --dtype bfloat16 --rho 0.3

The compressed layer has one base for all experts, of whose intermediate channels the share p is
kept, and a low-rank difference for each expert that stores the share rho of its matrix. Timed are

- *shared*: mctk's run time: what experts share is multiplied once per token;
- *naive*: the same terms in a loop over experts, base and difference in each, as the published
  D²-MoE code does it (mctk's own plain loop, which statistics use);
- *original*: transformers' experts of the uncompressed layer, by each of its implementations
  "eager" and "grouped_mm"; the ratio is to the one whose median is lower.

Within one run all take turns, each round in another order, and ratios are taken in each round:
times on a shared machine drift, ratios hardly do. Printed are medians [smallest-largest]. On one
processor thread the time is the processor's, which other jobs disturb less than the wall clock's.
*Bound* is k / (p + k rho): how much less there is to multiply; memory traffic, which decides small
batches, falls differently. Tokens go to uniformly drawn experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from mctk.runtime import TermExperts, observe
from mctk.terms import BankShape, Dense, LowRank, Term
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

ORIGINALS = ("eager", "grouped_mm")
Run = Callable[[], Tensor]


def original(options: argparse.Namespace) -> nn.Module:
    """Returns Mixtral's experts with random weights."""
    config = SimpleNamespace(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_local_experts=options.experts,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device(options.device):
        module = MixtralExperts(config).to(options.dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02).requires_grad_(False)
    return module


def compressed(module: nn.Module, options: argparse.Namespace, rho: float) -> TermExperts:
    """Returns the layer as a pruned base and low-rank differences, with random weights."""
    experts, hidden, wide = options.experts, options.hidden, options.intermediate
    rank = int(rho * hidden * wide / (hidden + wide)) // 8 * 8
    kept = torch.randperm(wide)[: int(options.kept * wide)].sort().values
    terms: dict[str, list[Term]] = {}

    def noise(*size: int) -> Tensor:
        return 0.02 * torch.randn(*size, device=options.device, dtype=options.dtype)

    channels = kept.to(options.device, torch.int32)
    for part in ("gate", "up", "down"):
        down = part == "down"
        shape = BankShape(experts, hidden, wide) if down else BankShape(experts, wide, hidden)
        size = (hidden, len(kept)) if down else (len(kept), hidden)
        index = {"cols" if down else "rows": channels}
        U = noise(experts, shape.out_features, rank)
        V = noise(experts, rank, shape.in_features)
        terms[part] = [
            Dense(shape, [0] * experts, noise(1, *size), **index),
            LowRank(shape, range(experts), range(experts), U=U, V=V),
        ]
    swapped = TermExperts(module, {p: [t.spec() for t in bank] for p, bank in terms.items()})
    for part, bank in terms.items():
        swapped.set_terms(part, bank)
    return swapped


def candidates(
    module: nn.Module, ours: TermExperts, inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Run]:
    """Returns what is timed, by name."""

    def run_original(implementation: str) -> Run:
        def run() -> Tensor:
            module.config._experts_implementation = implementation
            return module(*inputs)

        return run

    def naive() -> Tensor:
        with observe(ours, lambda *_: None):
            return ours(*inputs)

    runs: dict[str, Run] = {name: run_original(name) for name in ORIGINALS}
    return {"shared": lambda: ours(*inputs), "naive": naive, **runs}


def in_turns(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Returns each candidate's seconds for one call, in each round."""
    single = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter

    def seconds(run: Run, calls: int) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        return (clock() - start) / calls

    # Short calls are repeated until a clock can tell them apart.
    for run in runs.values():
        run()
    calls = max(1, int(0.1 / max(seconds(run, 1) for run in runs.values())))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(seconds(runs[name], calls))
    return taken


def spread(values: list[float], digits: int = 2) -> str:
    """Returns ``median [smallest-largest]``."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def main() -> None:
    """Prints one line for each rho and number of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", type=lambda name: getattr(torch, name))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--rho", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--kept", type=float, default=0.8, help="the base's kept channels, p")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 32, 1])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
    print(
        f"{device}, {options.dtype}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}; hidden {options.hidden}, intermediate {options.intermediate}, "
        f"{options.experts} experts, k {options.k}, p {options.kept}; {options.rounds} rounds"
    )
    print("rho  tokens  bound  naive/shared          original/shared       shared ms      faster")
    module = original(options)
    with torch.no_grad():
        for rho in options.rho:
            ours = compressed(module, options, rho)
            for tokens in options.tokens:
                x = torch.randn(tokens, options.hidden, device=options.device).to(options.dtype)
                scores = torch.rand(tokens, options.experts, device=options.device)
                weights, index = scores.softmax(1).topk(options.k)
                inputs = (x, index, weights.to(options.dtype))
                taken = in_turns(candidates(module, ours, inputs), options.rounds, options.device)
                shared = taken["shared"]
                faster = min(ORIGINALS, key=lambda name: statistics.median(taken[name]))
                naive = [n / s for n, s in zip(taken["naive"], shared, strict=True)]
                dense = [o / s for o, s in zip(taken[faster], shared, strict=True)]
                bound = options.k / (options.kept + options.k * rho)
                milliseconds = statistics.median(shared) * 1000
                print(
                    f"{rho:<4} {tokens:<7} {bound:<6.2f} {spread(naive):<21} {spread(dense):<21} "
                    f"{milliseconds:<14.1f} {faster}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
