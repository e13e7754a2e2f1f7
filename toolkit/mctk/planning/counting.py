"""What a streamed model stores and computes, whatever terms its changed modules hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from ..checkpoint import ModelSizes, count, experts_per_token
from ..sweep import StreamedModel
from ..terms import Term


def count_model(
    model: StreamedModel,
    changed: Mapping[int, Mapping[str, list[Term]]],
    without: Collection[str] = (),
    stored: bool = False,
) -> ModelSizes:
    """Counts a streamed model whose changed modules hold these terms; see `checkpoint.count`."""
    head = model.language.get_output_embeddings()
    head_macs = math.prod(head.weight.shape) if head is not None else 0
    return count(
        model.source,
        model.weights,
        model.layers,
        model.layers_path,
        experts_per_token(model.config),
        head_macs,
        changed,
        frozenset(without),
        stored,
        idle=model.side,
    )
