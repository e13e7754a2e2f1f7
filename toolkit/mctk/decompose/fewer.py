"""Fewer experts in a layer: how many may stay, and what is stored then.

For methods of stage prune whose setting is the number of experts that stay. Which ones, data will
tell; what they store is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mctk.errors import UserError

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms


def present_groups(banks: Layer) -> list[list[int]]:
    """Returns the experts that are present in each of the router's groups, mostly one group.

    Args:
        banks: A layer's experts banks.
    """
    from mctk.terms import removed_members

    first = next(iter(banks.values()))
    gone = removed_members(banks.values())
    width = first.shape.members // first.groups
    return [
        [e for e in range(start, start + width) if e not in gone]
        for start in range(0, first.shape.members, width)
    ]


def expert_sizes(banks: Layer) -> tuple[list[int], list[int]]:
    """Returns how many experts may stay, and what the banks then store: the hook `sizes`.

    Equally many of each of the router's groups; of several groups two each at least. The last
    setting, DENSE, keeps all.

    Args:
        banks: A layer's experts banks.
    """
    from mctk.terms import DENSE

    groups = present_groups(banks)
    least = 1 if len(groups) == 1 else 2
    counts = [len(groups) * each for each in range(least, len(groups[0]))]
    costs = [
        sum(term.parameters() for terms in expert_layout(banks, count).values() for term in terms)
        for count in counts
    ]
    return [*counts, DENSE], [*costs, sum(bank.parameters() for bank in banks.values())]


def expert_layout(banks: Layer, size: int | None) -> Terms:
    """Returns the banks with the first `size` experts, those of each group: the hook `layout`.

    Args:
        banks: A layer's experts banks.
        size: How many experts stay, or DENSE.

    Raises:
        UserError: So many cannot.
    """
    from mctk.terms import DENSE, drop_members

    if size == DENSE:
        return {name: list(bank.terms) for name, bank in banks.items()}
    groups = present_groups(banks)
    each = checked_experts(banks, size) // len(groups)
    gone = [e for group in groups for e in group[each:]]
    return {name: drop_members(bank, gone) for name, bank in banks.items()}


def checked_experts(banks: Layer, size: int | None) -> int:
    """Returns how many experts stay, a setting that is not DENSE.

    Args:
        banks: A layer's experts banks.
        size: The setting.

    Raises:
        UserError: So many cannot stay.
    """
    groups = present_groups(banks)
    place = f"layer {next(iter(banks.values())).layer}"
    present = sum(map(len, groups))
    if size is None or not 1 <= size <= present:
        raise UserError(f"{place} has {present} experts and cannot keep {size}")
    if size % len(groups):
        raise UserError(
            f"the router of {place} divides its experts into {len(groups)} groups, and as many of "
            f"each must stay: {size} is no multiple"
        )
    return size
