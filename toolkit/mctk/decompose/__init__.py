"""What methods that decompose a bank into low-rank factors share."""

from .lowrank import (
    LowRankOptions,
    Truncatable,
    layout,
    matrices,
    members_of_slots,
    name_errors,
    only,
    replace,
    sizes,
    tail_errors,
)
from .moments import (
    MomentOptions,
    check_tokens,
    decompositions,
    moment_need,
    moment_side,
    pooled_inputs,
    pooled_outputs,
    seen,
    slot_moments,
)

__all__ = [
    "LowRankOptions",
    "MomentOptions",
    "Truncatable",
    "check_tokens",
    "decompositions",
    "layout",
    "matrices",
    "members_of_slots",
    "moment_need",
    "moment_side",
    "name_errors",
    "only",
    "pooled_inputs",
    "pooled_outputs",
    "replace",
    "seen",
    "sizes",
    "slot_moments",
    "tail_errors",
]
