"""A model without weights: its modules on the meta device, as transformers would build them."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UserError, brief
from .composite import auto_class
from .quantised import as_shown, refuse_quantised

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS_IMPLEMENTATION = "mctk"


def load_config(path: Path, raw: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    """Reads config.json as transformers does.

    Args:
        path: The model directory.
        raw: Its config.json, already parsed.
        trust_remote_code: Whether code that the directory carries may run.

    Raises:
        CheckpointError: Remote code unasked, an unknown model type, another quantised format.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = str(raw.get("model_type")) in CONFIG_MAPPING
    if "auto_map" in raw and not known and not trust_remote_code:
        raise CheckpointError(
            f"{path / 'config.json'}: the model needs code that its directory carries; read that "
            "code, then pass --trust-remote-code (recipe: trust_remote_code: true)"
        )
    if not known and "auto_map" not in raw:
        raise CheckpointError(
            f"{path / 'config.json'}: model_type {raw.get('model_type')!r} is unknown to the "
            "installed transformers"
        )
    refuse_quantised(path, raw)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a bad config
        raise CheckpointError(f"{path / 'config.json'}: {brief(error)}") from error
    as_shown(config, raw)
    return config


def resolve_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """Turns a recipe's dtype into torch's; "auto" is the checkpoint's own (float32 if unsaid)."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    # In the order of `from_pretrained`, should the two differ.
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype or torch.float32


def build(
    config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Builds the model that config.json names, with every parameter on the meta device.

    Buffers that no checkpoint holds (rotary frequencies) are real. A compressed checkpoint's
    modules are swapped in as on loading. The experts run by our implementation, so that a streamed
    forward and a later `from_pretrained` compute the same bits.

    Raises:
        UserError: transformers cannot build a causal language model of this configuration.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    from ..runtime import register, swap_from_config

    register()
    config = copy.deepcopy(config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    for part in (config, config.get_text_config()):
        # Some models then compute from what their layers would have recorded; ours record nothing.
        for record in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(part, record, None):
                setattr(part, record, False)
    try:
        # Thousands of small experts take half a minute to be given random numbers of no use.
        with init_empty_weights(include_buffers=False), _empty_on_meta(), no_init_weights():
            model = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"transformers cannot build a causal language model of type "
            f"{config.model_type!r}: {type(error).__name__}: {brief(error)}"
        ) from error
    model.tie_weights()  # part of what was left out
    if has_experts_interface(model):
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    if quantization is not None:
        swap_from_config(model, quantization)
    return model.eval()


def _empty_on_meta() -> contextlib.AbstractContextManager:
    """While open, `torch.empty` gives meta tensors.

    `init_empty_weights` moves a parameter to meta once it is made; a stack of experts may be larger
    than the memory that making it takes.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class EmptyOnMeta(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if function is torch.empty and kwargs.get("device") is None:
                kwargs["device"] = "meta"
            return function(*args, **kwargs)

    return EmptyOnMeta()


def has_experts_interface(model: PreTrainedModel) -> bool:
    """Whether any of the model's modules is run through transformers' experts interface."""
    return any(hasattr(module, "_apply_gate") for module in model.modules())
