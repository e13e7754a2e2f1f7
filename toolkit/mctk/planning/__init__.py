"""Plans: what a run will do and cost, found from headers alone."""

from .bounds import at_most, coarse_warning
from .budget import TOLERANCE
from .counting import count_model
from .describe import describe, resources
from .needs import TRACE_TOKENS
from .plan import Plan, Size, make_plan
from .quantised import byte_warnings, quantised_record
from .removal import (
    check_kept,
    config_without,
    experts_left,
    layer_shares,
    only_prunes,
    output_kind,
    uniform,
)
from .side import side_sizes
from .texts import count_windows
from .unread import unread_record, unread_warnings

__all__ = [
    "TOLERANCE",
    "TRACE_TOKENS",
    "Plan",
    "Size",
    "at_most",
    "byte_warnings",
    "check_kept",
    "coarse_warning",
    "config_without",
    "count_model",
    "count_windows",
    "describe",
    "experts_left",
    "layer_shares",
    "make_plan",
    "only_prunes",
    "output_kind",
    "quantised_record",
    "resources",
    "side_sizes",
    "uniform",
    "unread_record",
    "unread_warnings",
]
