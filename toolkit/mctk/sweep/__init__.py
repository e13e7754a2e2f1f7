"""Sweeps: tokens go through a model whose layers are read one at a time."""

from .backward import IGNORED, BackwardSweep, BackwardVisit
from .boundaries import BoundaryStore, KeptBatches
from .forward import ForwardSweep, LayerVisit, embed_batches, stream_logits
from .stream import LayerCall, StreamedModel

__all__ = [
    "IGNORED",
    "BackwardSweep",
    "BackwardVisit",
    "BoundaryStore",
    "ForwardSweep",
    "KeptBatches",
    "LayerCall",
    "LayerVisit",
    "StreamedModel",
    "embed_batches",
    "stream_logits",
]
