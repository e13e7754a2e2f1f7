"""What methods share: low rank, bases that experts share, averages of groups, fewer experts."""

from .averages import average, averaged, whole_experts
from .fewer import checked_experts, expert_layout, expert_sizes, present_groups
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
    "average",
    "averaged",
    "base_and_residuals",
    "check_tokens",
    "checked_experts",
    "decompositions",
    "expert_layout",
    "expert_sizes",
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
    "present_groups",
    "replace",
    "seen",
    "sizes",
    "slot_moments",
    "tail_errors",
    "whole_experts",
]
