"""Reading model directories and writing them: headers, weight maps, accounting, shards."""

from .accounting import (
    ModelSizes,
    active_parameters,
    count,
    experts_per_token,
    macs,
    original_terms,
    terms_in,
)
from .source import Source, TensorInfo, locate, read_header
from .weights import WeightMap, check_tied, empty, fill, map_weights

__all__ = [
    "ModelSizes",
    "Source",
    "TensorInfo",
    "WeightMap",
    "active_parameters",
    "check_tied",
    "count",
    "empty",
    "experts_per_token",
    "fill",
    "locate",
    "macs",
    "map_weights",
    "original_terms",
    "read_header",
    "terms_in",
]
