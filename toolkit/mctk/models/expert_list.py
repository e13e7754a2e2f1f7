"""A list of experts as banks: their matrices laid side by side in memory, once.

Fused experts are banks as they are; a list's matrices lie apart. A stacked copy would hold every
expert twice, so the stack is the only copy: the experts' own weights become views of it.
"""

from __future__ import annotations

import torch
from torch import nn

from ..runtime import linears


def stacked(module: nn.ModuleList, part: str, name: str = "weight") -> torch.Tensor | None:
    """All experts' tensors of one part as one tensor whose slices they are from now on.

    At most one part's tensors are there twice while they are laid side by side; a second call finds
    them so and moves nothing. Writing to the result writes to the experts.

    Args:
        module: An original list of experts, its weights loaded (or on meta).
        part: "gate", "up" or "down".
        name: "weight" or "bias".

    Returns:
        [E, out, in], or [E, out] of biases; None if the experts have no such tensor.
    """
    layers = []
    for expert in module:
        found = linears(expert)
        assert found is not None
        layers.append(found[part])
    tensors = [getattr(layer, name) for layer in layers]
    if tensors[0] is None:
        return None
    together = _together([tensor.detach() for tensor in tensors])
    if together is not None:
        return together
    first = tensors[0]
    stack = torch.empty((len(tensors), *first.shape), dtype=first.dtype, device=first.device)
    del tensors
    for place, layer in zip(stack, layers, strict=True):
        parameter = getattr(layer, name)
        place.copy_(parameter.detach())
        parameter.data = place  # frees the expert's own memory before the next one is copied
    return stack


def _together(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """The stack that tensors are the slices of, if they are."""
    first = tensors[0]
    size = first.numel()
    for number, tensor in enumerate(tensors):
        if (
            tensor.is_meta
            or not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or tensor.storage_offset() != first.storage_offset() + number * size
        ):
            return None
    return first.as_strided(
        (len(tensors), *first.shape), (size, *first.stride()), first.storage_offset()
    )
