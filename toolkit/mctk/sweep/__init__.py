"""Sweeps: tokens go through a model whose layers are read one at a time."""

from .forward import ForwardSweep, LayerVisit, stream_logits
from .stream import LayerCall, StreamedModel

__all__ = ["ForwardSweep", "LayerCall", "LayerVisit", "StreamedModel", "stream_logits"]
