"""Sharing a budget out: pure functions of lists of numbers.

An *item* is what gets one size, for instance the `down` bank of layer 3. It has a list of
*settings*, each with a stored size (`costs[item]`, strictly increasing; the last one keeps the item
whole) and, where the method can tell, an expected squared error (`errors[item]`, non-increasing).
The functions choose one setting per item, as a list of indices, and never spend more than `budget`.

Whole numbers stay whole numbers: no rounding of a fraction can push a total over the budget.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

Costs = Sequence[Sequence[int]]
Errors = Sequence[Sequence[float]]

# States that `_refine` keeps per item. It is exact as long as no more are needed, which is so for
# every small problem; past it the least promising are dropped (a beam search).
BEAM = 2000


class Infeasible(ValueError):
    """The smallest settings together are larger than the budget.

    Args:
        smallest: The smallest total that is attainable.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest attainable total is {smallest}")
        self.smallest = smallest


def total_cost(costs: Costs, choice: Sequence[int]) -> int:
    """Returns what a choice stores in total."""
    return sum(cost[k] for cost, k in zip(costs, choice, strict=True))


def total_error(errors: Errors, choice: Sequence[int]) -> float:
    """Returns the expected squared error of a choice, summed over the items."""
    return sum(error[k] for error, k in zip(errors, choice, strict=True))


def floors(costs: Costs, min_keep: float) -> list[int]:
    """Returns for every item the smallest setting that keeps `min_keep` of the item's own size."""
    return [bisect_left(cost, min_keep * cost[-1]) for cost in costs]


def check_feasible(costs: Costs, budget: int, lowest: Sequence[int]) -> None:
    """Raises `Infeasible` when even the lowest settings exceed the budget."""
    smallest = total_cost(costs, lowest)
    if smallest > budget:
        raise Infeasible(smallest)


def uniform(costs: Costs, budget: int) -> list[int]:
    """Lets every item keep the same fraction of its own size.

    Sizes come in steps, so each item lands a little below its share. What that leaves is carried
    from item to item, and an item takes one step more as soon as the carry pays for it (the way a
    sloping line is drawn with pixels): the extra steps are spread evenly over the layers, and the
    total stays within one step of one item of the budget.

    Returns:
        One setting per item, at most one step above the largest one within the item's share.

    Raises:
        Infeasible: The smallest settings exceed the budget.
    """
    count = len(costs)
    check_feasible(costs, budget, [0] * count)
    pinned = _pinned(costs, budget)
    share = budget - sum(costs[i][0] for i in pinned)
    whole = sum(costs[i][-1] for i in range(count) if i not in pinned)

    choice = [0] * count
    raised = set(pinned)
    seen = spent = 0
    for i in range(count):
        if i in pinned:
            continue
        seen += costs[i][-1]
        # The largest setting within share / whole of the item, by whole numbers.
        within = min(costs[i][-1] * share // whole, costs[i][-1])
        k = bisect_right(costs[i], within) - 1
        allowed = seen * share // whole
        if k + 1 < len(costs[i]) and spent + costs[i][k + 1] <= allowed:
            k += 1
            raised.add(i)
        choice[i] = k
        spent += costs[i][k]

    # Unequal items can leave room for a step of a small one.
    room = share - spent
    for i in range(count):
        k = choice[i]
        if i not in raised and k + 1 < len(costs[i]) and costs[i][k + 1] - costs[i][k] <= room:
            room -= costs[i][k + 1] - costs[i][k]
            choice[i] = k + 1
    return choice


def _pinned(costs: Costs, budget: int) -> set[int]:
    """Returns the items whose smallest setting is above their share: they are kept at it.

    What they take beyond their share lowers the share of the others, which may pin further ones.
    """
    pinned: set[int] = set()
    while True:
        share = budget - sum(costs[i][0] for i in pinned)
        free = [i for i in range(len(costs)) if i not in pinned]
        whole = sum(costs[i][-1] for i in free)
        more = {i for i in free if costs[i][0] * whole > costs[i][-1] * share}
        if not more:
            return pinned
        pinned |= more


def by_loss(
    costs: Costs, errors: Errors, budget: int, lowest: Sequence[int] | None = None
) -> list[int]:
    """Minimises the summed error within the budget.

    Steps are taken on the lower convex hull of every curve, best error per stored number first,
    until the budget is spent: optimal but for the last step, which may not fit. A search among the
    settings that the Lagrangian bound cannot rule out closes that gap, and what still fits is
    spent. The result is never worse than `uniform`. Hulls and their slopes are Shoham and Gersho's
    bit allocation (IEEE Trans. ASSP 36, 1988).

    Args:
        costs: Stored size of every setting of every item.
        errors: Expected squared error of the same settings, in one unit for all items.
        budget: What all items may store together.
        lowest: Smallest setting allowed per item (default: all are).

    Returns:
        One setting per item.

    Raises:
        Infeasible: The lowest settings exceed the budget.
    """
    lowest = [0] * len(costs) if lowest is None else list(lowest)
    check_feasible(costs, budget, lowest)
    choice, price = _greedy(costs, errors, budget, lowest)
    candidates = [_fill(costs, errors, budget, choice)]
    above = [cost[low:] for cost, low in zip(costs, lowest, strict=True)]
    even = uniform(above, budget)
    candidates.append([low + k for low, k in zip(lowest, even, strict=True)])
    best = min(candidates, key=lambda c: total_error(errors, c))
    refined = _refine(costs, errors, budget, lowest, price, total_error(errors, best))
    return best if refined is None else _fill(costs, errors, budget, refined)


def hull(cost: Sequence[int], error: Sequence[float], start: int = 0) -> list[int]:
    """Returns the settings from `start` on the lower convex hull of a curve.

    Along them the error that one more stored number removes only falls. (A low-rank curve in plain
    storage is not convex: from the last rank that pays to the dense matrix the error drops to 0.)
    """
    points: list[int] = []
    for k in range(start, len(cost)):
        if points and error[k] >= error[points[-1]]:
            continue  # stores more and removes nothing
        while len(points) >= 2 and _slope(cost, error, points[-2], points[-1]) <= _slope(
            cost, error, points[-1], k
        ):
            points.pop()
        points.append(k)
    return points


def _slope(cost: Sequence[int], error: Sequence[float], a: int, b: int) -> float:
    """Error removed per stored number from setting a to setting b."""
    return (error[a] - error[b]) / (cost[b] - cost[a])


def _greedy(
    costs: Costs, errors: Errors, budget: int, lowest: Sequence[int]
) -> tuple[list[int], float]:
    """Takes hull steps, best first, while they fit.

    Returns:
        The settings, and the price: the error per stored number of the first step that did not fit.
    """
    steps = []
    for i, low in enumerate(lowest):
        points = hull(costs[i], errors[i], low)
        for a, b in pairwise(points):
            steps.append((-_slope(costs[i], errors[i], a, b), i, a, b))
    steps.sort()
    choice = list(lowest)
    room = budget - total_cost(costs, choice)
    price: float | None = None
    for slope, i, a, b in steps:
        step = costs[i][b] - costs[i][a]
        if choice[i] == a and step <= room:
            choice[i] = b
            room -= step
        elif price is None:
            price = -slope
    return choice, price or 0.0


def _fill(costs: Costs, errors: Errors, budget: int, choice: Sequence[int]) -> list[int]:
    """Spends what is left on single steps, the one that removes most error per number first.

    Steps that remove nothing are taken as well, so that methods are compared at the same size.
    """
    choice = list(choice)
    room = budget - total_cost(costs, choice)
    while True:
        best: tuple[float, int] | None = None
        for i, k in enumerate(choice):
            if k + 1 < len(costs[i]) and costs[i][k + 1] - costs[i][k] <= room:
                step = (-_slope(costs[i], errors[i], k, k + 1), i)
                best = step if best is None else min(best, step)
        if best is None:
            return choice
        i = best[1]
        room -= costs[i][choice[i] + 1] - costs[i][choice[i]]
        choice[i] += 1


def _refine(
    costs: Costs,
    errors: Errors,
    budget: int,
    lowest: Sequence[int],
    price: float,
    upper: float,
) -> list[int] | None:
    """Searches for a choice with a smaller error than `upper`.

    With every stored number charged `price`, each item has a best setting; what another setting
    costs above it is its regret. A choice whose regrets sum to more than the distance between
    `upper` and the Lagrangian lower bound cannot be better, which leaves few settings. Those are
    combined item by item; of two partial choices, one with neither a smaller cost nor a smaller
    error is dropped.

    Returns:
        The better choice, or None if there is none (among those searched, past `BEAM` states).
    """
    charged = [
        [e + price * c for c, e in zip(cost, error, strict=True)]
        for cost, error in zip(costs, errors, strict=True)
    ]
    least = [min(row[low:]) for row, low in zip(charged, lowest, strict=True)]
    gap = upper - (sum(least) - price * budget)
    slack = 1e-12 * (abs(upper) + price * budget)
    kept = [
        [k for k in range(low, len(row)) if row[k] - bound <= gap + slack]
        for row, bound, low in zip(charged, least, lowest, strict=True)
    ]
    needed = [costs[i][ks[0]] for i, ks in enumerate(kept)]
    rest = sum(needed)

    # (cost, error, regret, path): a path is a linked list of settings, last item first.
    states: list[tuple[int, float, float, tuple]] = [(0, 0.0, 0.0, ())]
    for i, settings in enumerate(kept):
        rest -= needed[i]
        grown = []
        for cost, error, regret, path in states:
            for k in settings:
                more = regret + charged[i][k] - least[i]
                if more <= gap + slack and cost + costs[i][k] + rest <= budget:
                    grown.append((cost + costs[i][k], error + errors[i][k], more, (k, path)))
        grown.sort(key=lambda state: state[:2])
        states = []
        for state in grown:
            if not states or state[1] < states[-1][1]:
                states.append(state)
        if len(states) > BEAM:
            states = sorted(sorted(states, key=lambda state: state[2])[:BEAM])
    if not states:
        return None
    best = min(states, key=lambda state: state[1])
    if best[1] >= upper:
        return None
    choice, path = [], best[3]
    while path:
        k, path = path
        choice.append(k)
    return choice[::-1]


def by_score(costs: Costs, scores: Errors, budget: int) -> list[int]:
    """Takes steps in the order of what they take off the score, for all items alike.

    Every item starts at its smallest setting. The next step is the one that lowers its item's score
    most (of equals that of the first item), whatever it costs, until no step fits. Where scores
    fall by less and less and all steps cost the same that is one threshold on a step's worth: with
    the shares of tokens that experts get, M-SMoE's choice of dominant experts (arXiv 2310.01334).

    Args:
        costs: Stored size of every setting of every item.
        scores: What each setting leaves out, falling, in one unit for all items.
        budget: What all items may store together.

    Returns:
        One setting per item.

    Raises:
        Infeasible: The smallest settings exceed the budget.
    """
    choice = [0] * len(costs)
    check_feasible(costs, budget, choice)
    room = budget - total_cost(costs, choice)
    steps = [(scores[i][1] - scores[i][0], i) for i in range(len(costs)) if len(costs[i]) > 1]
    heapify(steps)
    while steps:
        _, i = heappop(steps)
        k = choice[i]
        step = costs[i][k + 1] - costs[i][k]
        if step > room:
            continue  # nor does this item go any further
        choice[i], room = k + 1, room - step
        if k + 2 < len(costs[i]):
            heappush(steps, (scores[i][k + 2] - scores[i][k + 1], i))
    return choice
