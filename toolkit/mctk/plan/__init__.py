"""Plans: what a run will do and cost, found from headers alone."""

from .budget import TOLERANCE
from .describe import describe, resources
from .needs import TRACE_TOKENS
from .plan import Plan, Size, count_model, make_plan
from .removal import (
    check_kept,
    config_without,
    experts_left,
    layer_shares,
    only_prunes,
    output_kind,
)

__all__ = [
    "TOLERANCE",
    "TRACE_TOKENS",
    "Plan",
    "Size",
    "check_kept",
    "config_without",
    "count_model",
    "describe",
    "experts_left",
    "layer_shares",
    "make_plan",
    "only_prunes",
    "output_kind",
    "resources",
]
