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
from .fewer import Share, check_fewer, compacted, fewer, shares
from .hub import open_source
from .source import Source, TensorInfo, read_header
from .weights import WeightMap, check_tied, empty, fill, map_weights

__all__ = [
    "ModelSizes",
    "Share",
    "Source",
    "TensorInfo",
    "WeightMap",
    "active_parameters",
    "bank_macs",
    "check_fewer",
    "check_tied",
    "compacted",
    "count",
    "empty",
    "expert_macs",
    "experts_per_token",
    "fewer",
    "fill",
    "macs",
    "map_weights",
    "open_source",
    "original_terms",
    "read_header",
    "shares",
    "terms_in",
    "visited",
]
