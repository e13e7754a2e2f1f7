"""Which names say a number of experts: of a module's attributes, of a configuration's keys."""

from __future__ import annotations

import copy
import re
from typing import Any

# Integers of these names are no number of experts, whatever their value.
_OTHER = re.compile(r"shared|per_tok|top|group|size|dim|freq|step|layer|capacity|_id|idx|index")


def is_count_name(name: str) -> bool:
    """Whether an attribute or a configuration's key of this name may be a number of experts."""
    return "expert" in name and _OTHER.search(name) is None


def is_total_name(name: str) -> bool:
    """Whether an attribute may be the number of all that a router chooses among.

    That is the experts and, behind them, what shares their router: shared experts, or a choice that
    computes nothing.
    """
    return ("expert" in name or "router" in name) and _OTHER.search(name) is None


def with_fewer(config: Any, experts: int, count: int) -> Any:
    """A configuration that says another number of experts; the one given is not changed.

    Some forwards ask their configuration, not an attribute of their module.

    Args:
        config: The configuration that a module holds.
        experts: The number E that it says.
        count: What the copy says instead.
    """
    changed = copy.copy(config)
    for name, value in vars(config).items():
        if type(value) is int and value == experts and is_count_name(name):
            setattr(changed, name, count)
    return changed
