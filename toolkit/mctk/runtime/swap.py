"""Replaces a model's modules by modules of terms, as a checkpoint describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import CheckpointError
from .expert_list import TermExpertList, follow
from .experts import TermExperts
from .linear import TermLinear
from .owner import TermModule
from .resize import find_path, resize

if TYPE_CHECKING:
    from .quantizer import MctkConfig


def swap(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Replaces modules by modules of terms whose tensors are on the meta device.

    Args:
        model: A model, or a part of one if the paths are relative to it.
        modules: Module path → ``{"type": "experts", "terms": {"gate": [spec ...], ...}}``, the
            same with "expert_list", or ``{"type": "linear", "terms": [spec ...]}``.

    Raises:
        CheckpointError: Names the module and the key that does not fit the model.
    """
    for path, entry in modules.items():
        own_path = find_path(model, path)
        original = model.get_submodule(own_path)
        try:
            replacement = _replacement(original, entry)
        except CheckpointError as error:
            raise CheckpointError(f"module {path}: {error}") from error
        replacement.train(original.training)
        model.set_submodule(own_path, replacement)
        block = model.get_submodule(own_path.rpartition(".")[0])
        if not isinstance(replacement, TermLinear):
            # Some families' blocks would give random numbers to the experts that they had, before
            # the checkpoint's come; what else a block holds is in the checkpoint as well.
            block._is_hf_initialized = True
        if isinstance(replacement, TermExpertList):
            follow(block, replacement)


def swap_from_config(model: nn.Module, config: MctkConfig | Mapping[str, Any]) -> None:
    """Swaps the modules that a checkpoint's `quantization_config` names, checked first.

    Args:
        model: The model, without its weights.
        config: The quantization_config, parsed or as in config.json.
    """
    from .quantizer import MctkConfig, load_providers

    checked = config if isinstance(config, MctkConfig) else MctkConfig(**config)
    load_providers(checked.providers)
    resize(model, checked.experts)
    swap(model, checked.modules)


def _replacement(original: nn.Module, entry: Mapping[str, Any]) -> TermModule:
    if not isinstance(entry, Mapping) or set(entry) != {"type", "terms"}:
        raise CheckpointError(f"must have 'type' and 'terms', not {entry!r:.200}")
    kind, terms = entry["type"], entry["terms"]
    if kind in ("experts", "expert_list"):
        if not isinstance(terms, Mapping):
            raise CheckpointError(f"terms: must map banks to lists, not {terms!r:.200}")
        for part, specs in terms.items():
            _check_specs(f"terms.{part}", specs)
        return (TermExperts if kind == "experts" else TermExpertList)(original, terms)
    if kind == "linear":
        _check_specs("terms", terms)
        if isinstance(original, TermLinear):
            dtype = original.dtype
        elif isinstance(original, nn.Linear):
            dtype = original.weight.dtype
        else:
            raise CheckpointError(f"{type(original).__name__} is not a linear layer")
        features = original.in_features, original.out_features
        return TermLinear(*features, terms, **({} if dtype is None else {"dtype": dtype}))
    raise CheckpointError(f"type: must be 'experts', 'expert_list' or 'linear', not {kind!r}")


def _check_specs(key: str, specs: object) -> None:
    if not isinstance(specs, (list, tuple)) or not all(isinstance(s, Mapping) for s in specs):
        raise CheckpointError(f"{key}: must be a list of terms, not {specs!r:.200}")
