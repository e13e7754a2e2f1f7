"""Reading model directories and writing them: headers, weight maps, accounting, shards."""

from .accounting import (
    ModelSizes,
    active_parameters,
    bank_macs,
    count,
    expert_macs,
    experts_per_token,
    macs,
    original_terms,
    terms_in,
    visited,
)
from .hub import open_source
from .source import Source, TensorInfo, read_header
from .weights import WeightMap, check_tied, empty, fill, map_weights

__all__ = [
    "ModelSizes",
    "Source",
    "TensorInfo",
    "WeightMap",
    "active_parameters",
    "bank_macs",
    "check_tied",
    "count",
    "empty",
    "expert_macs",
    "experts_per_token",
    "fill",
    "macs",
    "map_weights",
    "open_source",
    "original_terms",
    "read_header",
    "terms_in",
    "visited",
]
