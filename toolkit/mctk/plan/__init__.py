"""Plans: what a run will do and cost, found from headers alone."""

from .budget import TOLERANCE
from .describe import describe, resources
from .layout import MetaTerms, lay_out_layer
from .needs import TRACE_TOKENS
from .plan import Plan, Size, count_model, make_plan

__all__ = [
    "TOLERANCE",
    "TRACE_TOKENS",
    "MetaTerms",
    "Plan",
    "Size",
    "count_model",
    "describe",
    "lay_out_layer",
    "make_plan",
    "resources",
]
