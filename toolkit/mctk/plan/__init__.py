"""Plans: what a run will do and cost, found from headers alone."""

from .budget import TOLERANCE
from .describe import describe, resources
from .needs import TRACE_TOKENS
from .plan import Plan, Size, count_model, make_plan

__all__ = [
    "TOLERANCE",
    "TRACE_TOKENS",
    "Plan",
    "Size",
    "count_model",
    "describe",
    "make_plan",
    "resources",
]
