"""Which experts to keep: searches over subsets by a loss that is given as a function.

`exact` is NAEE's enumeration (arXiv 2402.14800, section 3.2), which its authors call cumbersome for
32 experts (Limitations); `beam` is ours.

Where a router divides the experts into groups, as many of each group stay; `groups` are those that
are left of each, in order. Of equal losses the subset that comes first in the order of tuples wins:
experts with low numbers stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product

Subset = tuple[int, ...]
Loss = Callable[[Subset], float]
Groups = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        kept: The experts that stay, ascending.
        loss: Their loss.
        tried: How many subsets were looked at.
    """

    kept: Subset
    loss: float
    tried: int


def count_subsets(groups: Groups, kept: int) -> int:
    """How many subsets keep `kept` experts, as many of each group."""
    each = kept // len(groups)
    return math.prod(math.comb(len(group), each) for group in groups)


def exact(loss: Loss, groups: Groups, kept: int) -> Choice:
    """Tries every subset."""
    each = kept // len(groups)
    parts = [combinations(group, each) for group in groups]
    tried = {subset: loss(subset) for subset in map(_joined, product(*parts))}
    return _best(tried, len(tried))


def beam(
    loss: Loss,
    groups: Groups,
    kept: int,
    width: int = 1,
    weights: Mapping[int, float] | None = None,
) -> Choice:
    """Removes one expert of every group at a time, keeping the `width` best subsets in each round.

    Width 1 is greedy backward elimination; with one expert to remove of one group it is exact.

    Args:
        loss: The loss of keeping a subset.
        groups: The experts that are present.
        kept: How many stay in all.
        width: How many subsets go into the next round.
        weights: A first idea of what each expert is worth, where several groups lose one each.
    """
    front: list[list[Subset]] = [[tuple(group) for group in groups]]
    tried = 0
    found: dict[Subset, float] = {}
    for _ in range(len(groups[0]) - kept // len(groups)):
        found = {}
        states: dict[Subset, list[Subset]] = {}
        for state in front:
            for smaller in _smaller(loss, state, weights or {}):
                subset = _joined(smaller)
                if subset not in found:
                    found[subset], states[subset] = loss(subset), smaller
        tried += len(found)
        ranked = sorted(found, key=lambda subset: (found[subset], subset))
        front = [states[subset] for subset in ranked[:width]]
    if not found:
        subset = _joined(front[0])
        found = {subset: loss(subset)}
    return _best(found, tried)


def _smaller(
    loss: Loss, state: Sequence[Subset], weights: Mapping[int, float]
) -> Iterator[list[Subset]]:
    """Yields states with one expert less in every group.

    All of them for one group. For several, one group after the other chooses its expert while the
    others keep to theirs, which are at first those of least weight: everything that is tried.
    """
    gone = [min(group, key=lambda e: (weights.get(e, 0.0), -e)) for group in state]
    for number, group in enumerate(state):
        options = []
        for expert in reversed(group):
            picked = [*gone[:number], expert, *gone[number + 1 :]]
            without = [
                tuple(e for e in members if e != out)
                for members, out in zip(state, picked, strict=True)
            ]
            yield without
            options.append((loss(_joined(without)), -expert, expert))
        gone[number] = min(options)[2]


def _joined(parts: Iterable[Subset]) -> Subset:
    return tuple(chain.from_iterable(parts))


def _best(losses: Mapping[Subset, float], tried: int) -> Choice:
    kept = min(losses, key=lambda subset: (losses[subset], subset))
    return Choice(kept, losses[kept], tried)
