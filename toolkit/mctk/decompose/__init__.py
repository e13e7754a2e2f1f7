"""What methods that decompose a bank into low-rank factors share."""

from .lowrank import (
    LowRankOptions,
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
    decompositions,
    moment_need,
    moment_side,
    pooled_inputs,
    pooled_outputs,
    seen,
)

__all__ = [
    "LowRankOptions",
    "MomentOptions",
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
    "tail_errors",
]
