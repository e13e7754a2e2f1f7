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
from .hub import open_source
from .source import Source, TensorInfo, read_header
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
    "macs",
    "map_weights",
    "open_source",
    "original_terms",
    "read_header",
    "terms_in",
]
