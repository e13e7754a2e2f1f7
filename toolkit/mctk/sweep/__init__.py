"""Sweeps: tokens go through a model whose layers are read one at a time."""

from .backward import IGNORED, BackwardSweep, BackwardVisit
from .boundaries import BoundaryStore
from .forward import ForwardSweep, LayerVisit, stream_logits
from .stream import LayerCall, StreamedModel

__all__ = [
    "IGNORED",
    "BackwardSweep",
    "BackwardVisit",
    "BoundaryStore",
    "ForwardSweep",
    "LayerCall",
    "LayerVisit",
    "StreamedModel",
    "stream_logits",
]
