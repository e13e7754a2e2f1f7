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
from .portions import Portions
from .quantised import Quantised
from .source import Source, TensorInfo, read_header
from .unread import (
    Unread,
    crowded,
    extra_layers,
    find_unread,
    predictor_keys,
    size_of_tensors,
    without_predictors,
)
from .weights import WeightMap, check_tied, empty, fill, map_weights

__all__ = [
    "ModelSizes",
    "Portions",
    "Quantised",
    "Share",
    "Source",
    "TensorInfo",
    "Unread",
    "WeightMap",
    "active_parameters",
    "bank_macs",
    "check_fewer",
    "check_tied",
    "compacted",
    "count",
    "crowded",
    "empty",
    "expert_macs",
    "experts_per_token",
    "extra_layers",
    "fewer",
    "fill",
    "find_unread",
    "macs",
    "map_weights",
    "open_source",
    "original_terms",
    "predictor_keys",
    "read_header",
    "shares",
    "size_of_tensors",
    "terms_in",
    "visited",
    "without_predictors",
]
