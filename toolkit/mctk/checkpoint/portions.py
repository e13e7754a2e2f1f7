"""How much of a source tensor ends up where, if it feeds several of the model's.

Mostly a source tensor feeds one, or several that have one fate. ERNIE-4.5-VL numbers its experts
for text and for images through and has them loaded together: those for text may be compressed, and
the others stay.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from fractions import Fraction
from functools import cached_property

from torch import nn


class Portions:
    """Portions of source tensors by the sizes of what they feed.

    Args:
        layers: The decoder layers (meta is enough).
        path: Their path in the model.
    """

    def __init__(self, layers: Iterable[nn.Module], path: str) -> None:
        self._layers, self._path = list(layers), path

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {
            f"{self._path}.{index}.{name}": tensor.numel()
            for index, layer in enumerate(self._layers)
            for name, tensor in layer.state_dict().items()
        }

    def of(self, targets: Sequence[str], wanted: Container[str]) -> Fraction:
        """How much of what a source tensor feeds is wanted.

        Summed over all source tensors of the same targets it is exact.

        Args:
            targets: The model's tensors that it feeds.
            wanted: Some of the model's tensors.
        """
        inside = [target for target in targets if target in wanted]
        if len(inside) in (0, len(targets)):
            return Fraction(bool(inside))
        sizes = self._sizes
        return Fraction(sum(sizes[t] for t in inside), sum(sizes[t] for t in targets))
