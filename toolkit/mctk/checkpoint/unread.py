"""Tensors that transformers does not read with the model: what they are, kept or left out.

Mostly they are layers for multi-token prediction: small models that guess further tokens from the
last hidden states, for speculative decoding. They lie behind the decoder layers, as layer 61 of
DeepSeek-V3 does, or under a name of their own (`mtp.`). Serving engines and transformers'
`generate(use_mtp=True)` build them by the same config.json as the decoder layers, with as many
experts: fewer experts there leave a prediction layer that has experts with too many, and since no
calibration token passes it, nothing says which of them could go.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_NAMED = re.compile(r"(?:^|\.)(?:mtp|nextn)")
# What configurations call the number of prediction layers.
_COUNT = re.compile(r"num_nextn_predict_layers|(num_)?mtp_(num_)?(hidden_)?(layers|modules)")


@dataclass(frozen=True)
class Unread:
    """A checkpoint's unread tensors.

    Attributes:
        predictors: Those of layers for multi-token prediction.
        others: All else.
    """

    predictors: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.predictors + self.others

    @property
    def routed(self) -> bool:
        """Whether the prediction layers have experts of their own."""
        return any("experts" in name.split(".") for name in self.predictors)


def find_unread(names: Iterable[str], layers: int) -> Unread:
    """Sorts unread tensors.

    Args:
        names: The tensors.
        layers: How many decoder layers the model has.
    """
    predictors: list[str] = []
    others: list[str] = []
    for name in names:
        match = _LAYER.search(name)
        behind = match is not None and int(match[1]) >= layers
        (predictors if behind or _NAMED.search(name) else others).append(name)
    return Unread(tuple(predictors), tuple(others))


def crowded(source: Source, unread: Unread, experts: int) -> tuple[str, ...]:
    """The tensors of the prediction layers, if those have more experts than config.json says.

    Args:
        source: The checkpoint that has them.
        unread: Its unread tensors.
        experts: How many experts config.json says of every layer.
    """
    theirs = 0
    for name in unread.predictors:
        match = _EXPERT.search(name)
        if match is not None:
            theirs = max(theirs, int(match[1]) + 1)
        elif "experts" in name.split("."):
            theirs = max((theirs, *source.tensors[name].shape[:1]))
    return unread.predictors if theirs > experts else ()


def extra_layers(
    model: PreTrainedModel, config: Mapping[str, Any], unread: Iterable[str], layers: int
) -> int:
    """How many layers that transformers does not read may follow the decoder layers in the files.

    Args:
        model: The skeleton; its class may name a layer that it passes over.
        config: The config.json, which may say how many.
        unread: The unread tensors.
        layers: How many decoder layers there are.
    """
    said = [getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0]
    for place in predictor_keys(config):
        value: Any = config
        for key in place:
            value = value[key]
        said.append(value)
    passed_over = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    next_one = [
        name
        for name in unread
        if (match := _LAYER.search(name)) is not None and int(match[1]) == layers
    ]
    if any(re.search(pattern, name) for name in next_one for pattern in passed_over):
        said.append(1)
    return max(said)


def predictor_keys(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Where a config.json says how many layers for multi-token prediction there are."""
    found: list[tuple[str, ...]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += [(key, *rest) for rest in predictor_keys(value)]
        elif _COUNT.fullmatch(key) and type(value) is int and value > 0:
            found.append((key,))
    return found


def without_predictors(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says of no layers for multi-token prediction."""
    changed = copy.deepcopy(dict(config))
    for place in predictor_keys(config):
        inner: Any = changed
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = 0
    return changed


def size_of_tensors(source: Source, names: Iterable[str]) -> dict[str, int]:
    """How many tensors these are, their elements, and the bytes that they take in the source."""
    from .source import FLOATING

    infos = [source.tensors[name] for name in names]
    return {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos if info.dtype in FLOATING),
        "bytes": sum(source.stored_bytes(info.name) for info in infos),
    }
