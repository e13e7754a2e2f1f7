"""Tiny random models of every family, and tokens for them.

All have H = 32, I = 24 and 4 experts of which 2 are used (8 in families whose routers divide them
into groups): no two of H, I, E are equal, so that a layout taken for another cannot go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mctk.runtime import restore_buffers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from .common import COMMON, VOCABULARY
from .multimodal import MULTIMODAL
from .text import NO_LANGUAGE_MODEL, TEXT
from .text_more import TEXT_MORE

CONFIGS: dict[str, dict] = {**TEXT, **TEXT_MORE, **MULTIMODAL}
"""Model type → what its tiny configuration has beside or instead of `COMMON`."""

# A dense model: its linear layers can be compressed too, and it has no experts to check for.
DENSE: dict[str, dict] = {"llama": {"intermediate_size": 24}}
# The head that a family's checkpoints have: the first of these that transformers knows for all of
# its configuration (of some that also see, a causal language model is the text part alone).
_HEADS = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForTokenClassification,
)


def tiny_config(name: str, **changes: object) -> PretrainedConfig:
    """Returns the configuration of `tiny(name)`; keyword arguments replace single entries.

    The language model's entries are in `text_config` where a family has one. An entry of `COMMON`
    that a family sets to None is left out.
    """
    own = {**CONFIGS, **DENSE, **NO_LANGUAGE_MODEL}[name]
    entries = _with_language(own, changes) or _language(own, changes)
    return AutoConfig.for_model(name, **entries)


def _with_language(own: dict, changes: dict) -> dict | None:
    """The entries with those of the language model completed; None if they are not nested."""
    if "text_config" in own:
        return {**own, "text_config": _language(own["text_config"], changes)}
    for key, part in own.items():  # the first that has a text model is the one that writes
        inner = _with_language(part, changes) if isinstance(part, dict) else None
        if inner is not None:
            return {**own, key: inner}
    return None


def _language(own: dict, changes: dict) -> dict:
    """The language model's entries: the common ones and its own, less those that it has not."""
    entries = {**COMMON, **own, **changes}
    return {key: v for key, v in entries.items() if v is not None or key not in COMMON}


def head_for(config: PretrainedConfig) -> Any:
    """The Auto class that loads checkpoints of this configuration."""
    if hasattr(config, "auto_map"):  # of remote code, which transformers does not list
        return AutoModelForCausalLM
    return next(auto for auto in _HEADS if _takes(auto, config))


def tiny(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Returns a float32 model of the family with random weights in evaluation mode.

    Matrices are drawn with a standard deviation that keeps the size of activations; vectors
    (biases, norms, sinks, correction biases) are non-trivial too, so that a forgotten one shows.
    """
    config = tiny_config(name, **changes)
    model = head_for(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dtype == torch.int64 and tensor.ndim == 2:
                # The experts of every token, where a table routes; all have four at least.
                tensor.copy_(torch.rand(tensor.shape[0], 4, generator=generator).argsort()[:, :2])
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(0.2 * noise)
            elif key.endswith("norm.weight") or "norm" in key.rpartition(".")[0].rpartition(".")[2]:
                tensor.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                tensor.copy_(0.2 * noise)
    return model


def load(path: Path) -> PreTrainedModel:
    """A saved model in memory, as its checkpoints are loaded; its experts run as in a stream."""
    head = head_for(AutoConfig.from_pretrained(path, trust_remote_code=True))
    model = head.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("mctk")
    if hasattr(model.config, "auto_map"):
        restore_buffers(model)  # transformers leaves those of code of 2024 undefined
    return model


def _takes(auto: type, config: PretrainedConfig) -> bool:
    """Whether an auto class builds a model of a whole configuration."""
    known = type(config) in auto._model_mapping
    return known and auto._model_mapping[type(config)].config_class is type(config)


def token_ids(rows: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """Returns random token ids, [rows, length], without the special tokens 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
