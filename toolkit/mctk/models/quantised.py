"""What config.json says of weights that are stored quantised, and which formats are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SETTINGS = ("quantization_config", "compression_config")


def quantisation(config: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """The key of config.json that says of quantised weights, the method, its settings.

    None where they are not quantised, or compressed by mctk.
    """
    for part in (config, text_part(config)):
        for key in SETTINGS:
            settings = part.get(key)
            method, known = settings, {}
            if isinstance(settings, Mapping):
                method, known = settings.get("quant_method", "unknown"), dict(settings)
            if settings and method != "mctk":
                return key, str(method), known
    return None


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json; empty where that is the whole."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else {}


def refuse_quantised(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses quantised weights; those that a `Source` dequantises it has taken out of `config`.

    Raises:
        CheckpointError: Names the format and what to do.
    """
    said = quantisation(config)
    if said is not None and "quant_method" not in said[2] and "transform_config" in said[2]:
        transforms = ", ".join(map(str, said[2]["transform_config"]))
        raise CheckpointError(
            f"{path / 'config.json'}: {said[0]}: the weights are not quantised, but transformed "
            f"({transforms}), a form for serving that is not read; give what it was made from"
        )
    if said is not None:
        raise CheckpointError(
            f"{path / 'config.json'}: {said[0]}: weights quantised by {said[1]!r} cannot be read; "
            "of quantised weights, FP8 ('fp8') and MXFP4 ('mxfp4') are: give the bfloat16, float16 "
            "or float32 model that they were made from"
        )


def as_shown(config: PretrainedConfig, raw: Mapping[str, Any]) -> None:
    """Takes from a configuration what its file says of quantised weights that a `Source` hides.

    Args:
        config: As transformers read it from the file.
        raw: The file as the `Source` shows it.
    """
    text = config.get_text_config()
    for part in (config, text):
        for key in SETTINGS:
            if key not in raw and hasattr(part, key):
                delattr(part, key)
    if config.dtype is None and text.dtype is None:
        config.dtype = raw.get("dtype") or raw.get("torch_dtype")
