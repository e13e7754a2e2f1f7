"""Plans: what a run will do and cost, found from headers alone."""

from .describe import describe, resources
from .plan import TOLERANCE, TRACE_TOKENS, Plan, Size, count_model, make_plan

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
