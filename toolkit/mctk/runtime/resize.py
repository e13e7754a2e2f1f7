"""Layers with other numbers of experts than config.json says, made so before weights are loaded.

transformers builds every layer with the one number of its configuration. Where a checkpoint's
layers keep different numbers, its `quantization_config` lists, layer by layer, what is smaller:
which tensors along which dimension, which integers, which lists of experts. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import CheckpointError
from .counts import with_fewer
from .expert_list import join

_KEYS = {"count", "tensors", "integers", "lists"}


def resize(model: nn.Module, experts: Mapping[str, Any]) -> None:
    """Gives layers the numbers of experts that a checkpoint says.

    Args:
        model: The model, without its weights; or a part of one, if the paths are relative to it.
        experts: Layer path → {"count": how many experts it has, "tensors": {path in the layer:
            dimension}, "integers": [paths of attributes], "lists": [paths of lists of experts]}.

    Raises:
        CheckpointError: Names the layer and the key that does not fit the model.
    """
    for path, entry in experts.items():
        try:
            _resize(model.get_submodule(find_path(model, path)), entry)
        except CheckpointError as error:
            raise CheckpointError(f"experts of {path}: {error}") from error


def find_path(model: nn.Module, path: str) -> str:
    """A module's path in this model: headless, with a head, or the text model alone of several.

    Raises:
        CheckpointError: It has no such module.
    """
    for candidate in _paths(model, path):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise CheckpointError(f"module {path}: {type(model).__name__} has no such module")


def _paths(model: nn.Module, path: str) -> Iterator[str]:
    """What a path may be in a model, last as loading renames the tensors that lie there."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    yield from (path, path.removeprefix(prefix), prefix + path)
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    if isinstance(model, PreTrainedModel):
        for entry in get_model_conversion_mapping(model):
            if isinstance(entry, WeightRenaming):
                path, _ = entry.rename_source_key(path)
        yield path


def _resize(layer: nn.Module, entry: Any) -> None:
    if not isinstance(entry, Mapping) or set(entry) != _KEYS:
        raise CheckpointError(f"must have {', '.join(sorted(_KEYS))}, not {entry!r:.200}")
    count = entry["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CheckpointError(f"count: must be a positive integer, not {count!r}")
    sizes = {name: _size(layer, name, dim) for name, dim in entry["tensors"].items()}
    small = [name for name, size in sizes.items() if size < count]
    if small:
        raise CheckpointError(
            f"tensors.{small[0]}: has {sizes[small[0]]} entries, the checkpoint {count} experts"
        )
    # A router may have entries behind those of its experts (shared experts', for instance), which
    # stay: what is smallest has none.
    experts = min(sizes.values(), default=count)
    holders = []
    for name, dim in entry["tensors"].items():
        module, key = _holder(layer, name, "tensors")
        store = module._parameters if key in module._parameters else module._buffers
        tensor = store[key]
        assert tensor is not None
        smaller = tensor.detach().narrow(dim, 0, sizes[name] - experts + count).clone()
        store[key] = nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller
        holders.append(module)
    for name in entry["integers"]:
        module, key = _holder(layer, name, "integers")
        value = getattr(module, key, None)
        if type(value) is not int:
            raise CheckpointError(f"integers.{name}: the model has no such integer")
        setattr(module, key, value - experts + count)
        holders.append(module)
    for module in holders:
        # Experts ask their configuration how they are to run, which may yet change: no copy there.
        if vars(module).get("config") is not None and not hasattr(module, "is_transposed"):
            module.config = with_fewer(module.config, experts, count)
    for name in entry["lists"]:
        module, key = _holder(layer, name, "lists")
        listed = getattr(module, key, None)
        if not isinstance(listed, nn.ModuleList) or len(listed) < count:
            raise CheckpointError(f"lists.{name}: the model has no list of {count} experts there")
        fewer = nn.ModuleList(list(listed)[:count])
        setattr(module, key, fewer)
        join(module, fewer)


def _size(layer: nn.Module, name: str, dim: Any) -> int:
    """How many entries a tensor has in a dimension."""
    module, key = _holder(layer, name, "tensors")
    store = module._parameters if key in module._parameters else module._buffers
    tensor = store.get(key)
    if tensor is None or not isinstance(dim, int) or not 0 <= dim < tensor.dim():
        raise CheckpointError(f"tensors.{name}: the model has no such dimension ({dim!r})")
    return tensor.shape[dim]


def _holder(layer: nn.Module, path: Any, key: str) -> tuple[nn.Module, str]:
    where, _, name = str(path).rpartition(".")
    try:
        return layer.get_submodule(where), name
    except AttributeError as error:
        raise CheckpointError(f"{key}.{path}: the model has no such module") from error


def resized_entry(
    layer: nn.Module, experts: str, count: int, tensors: Mapping[str, int], integers: Any
) -> dict[str, Any]:
    """Describes a layer of fewer experts, as `resize` takes it.

    Args:
        layer: The layer, of all experts.
        experts: The experts' path in it.
        count: How many are left.
        tensors: Its router's tensors → the dimension that is the experts'.
        integers: Its integers that are the number of experts.
    """
    module = layer.get_submodule(experts)
    listed = isinstance(module, nn.ModuleList)
    own = [] if listed else [name for name, _ in module.named_parameters(recurse=False)]
    fused = {f"{experts}.{name}": 0 for name in own}
    return {
        "count": count,
        "tensors": {**tensors, **fused},
        "integers": list(integers),
        "lists": [experts] if listed else [],
    }
