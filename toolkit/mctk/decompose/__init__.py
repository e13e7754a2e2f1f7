"""What methods share that decompose a bank into low-rank factors, or merge one for that."""

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
from .merged import base_and_residuals, own_matrices, part_of
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
    "base_and_residuals",
    "check_tokens",
    "decompositions",
    "layout",
    "matrices",
    "members_of_slots",
    "moment_need",
    "moment_side",
    "name_errors",
    "only",
    "own_matrices",
    "part_of",
    "pooled_inputs",
    "pooled_outputs",
    "replace",
    "seen",
    "sizes",
    "slot_moments",
    "tail_errors",
]
