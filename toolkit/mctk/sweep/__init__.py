"""Sweeps: tokens go through a model whose layers are read one at a time."""

from .backward import IGNORED, BackwardSweep, BackwardVisit
from .boundaries import BoundaryStore, KeptBatches
from .forward import ForwardSweep, LayerVisit, embed_batches, stream_logits
from .passed import LayerCall, Passed
from .stream import StreamedModel

__all__ = [
    "IGNORED",
    "BackwardSweep",
    "BackwardVisit",
    "BoundaryStore",
    "ForwardSweep",
    "KeptBatches",
    "LayerCall",
    "LayerVisit",
    "Passed",
    "StreamedModel",
    "embed_batches",
    "stream_logits",
]
