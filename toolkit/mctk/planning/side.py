"""What a model of several modalities holds beside its text model, and what it weighs."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from ..checkpoint import Portions
from ..checkpoint.source import FLOATING

if TYPE_CHECKING:
    from ..sweep import StreamedModel


def side_sizes(model: StreamedModel) -> dict[str, dict[str, int]]:
    """Sizes of each part that text alone never meets: a vision tower, a projector, a talker.

    They are copied as they are, and count as stored, so a budget `of: model` is of them as well.

    Returns:
        Path of the part → "parameters" and "bytes", as the source stores them.
    """
    portions = Portions(model.layers, model.layers_path)
    found: dict[str, dict[str, Fraction]] = {}
    for name, targets in model.weights.targets.items():
        info = model.source.tensors[name]
        for part in {model.side[target] for target in targets if target in model.side}:
            own = [target for target in targets if model.side.get(target) == part]
            share = portions.of(targets, own)
            sizes = found.setdefault(part, {"parameters": Fraction(0), "bytes": Fraction(0)})
            sizes["parameters"] += share * (info.numel if info.dtype in FLOATING else 0)
            sizes["bytes"] += share * model.source.stored_bytes(name)
    return {part: {key: int(n) for key, n in sizes.items()} for part, sizes in found.items()}
