"""Code that a checkpoint carries, written for transformers of 2024: what it needs to load and run.

Nothing here acts unless the user trusts the code (`trust_remote_code`): transformers loads no
remote code otherwise. And nothing acts on code that loads by itself: it is tried as it is, and only
if it imports a name that transformers has dropped, once more (by `mctk.hook`) with the names below
in place. They are in place while that file is imported and are taken away again; what stays are the
remote file's own references to them, and what `mend` changes in its own classes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKS = "transformers.modeling_attn_mask_utils"
REMOTE = "transformers_modules"
"""The package into which transformers loads remote code."""


def causal_mask(
    attention_mask: Tensor | None,
    input_shape: tuple[int, int],
    inputs_embeds: Tensor,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> Tensor:
    """The additive mask ``[B, 1, T, past + T]``: 0 where a token looks, the least number elsewhere.

    Stands for `_prepare_4d_causal_attention_mask`.

    Args:
        attention_mask: ``[B, past + T]``, 0 for padding; None for none.
        input_shape: B and T.
        inputs_embeds: Says dtype and device.
        past_key_values_length: Tokens before these.
        sliding_window: Tokens that one sees, itself included; None for all.
    """
    batch, length = input_shape
    dtype, device = inputs_embeds.dtype, inputs_embeds.device
    keys = torch.arange(past_key_values_length + length, device=device)
    queries = keys[past_key_values_length:, None]
    seen = keys <= queries
    if sliding_window is not None:
        seen &= keys > queries - sliding_window
    seen = seen.expand(batch, 1, *seen.shape)
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None, :] != 0)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


def causal_mask_for_sdpa(
    attention_mask: Tensor | None,
    input_shape: tuple[int, int],
    inputs_embeds: Tensor,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> Tensor | None:
    """`causal_mask`, or None where scaled-dot-product attention may apply its own causal mask.

    Rows of padding that see nothing look everywhere, or their softmax would be NaN.
    """
    whole = attention_mask is None or bool((attention_mask != 0).all())
    alone = past_key_values_length == 0 or input_shape[1] == 1
    short = sliding_window is None or past_key_values_length + input_shape[1] <= sliding_window
    if whole and alone and short:
        return None
    mask = causal_mask(
        attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window
    )
    blind = (mask == torch.finfo(mask.dtype).min).all(dim=-1, keepdim=True)
    return mask.masked_fill(blind, 0.0)


def padding_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """The additive mask ``[B, 1, tgt, src]`` of padding alone, from ``[B, src]``.

    Stands for `_prepare_4d_attention_mask`.
    """
    length = mask.shape[1] if tgt_len is None else tgt_len
    seen = (mask[:, None, None, :] != 0).expand(-1, 1, length, -1)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )


def _mask_module() -> ModuleType:
    """`transformers.modeling_attn_mask_utils`, which is gone, by what remote code takes from it.

    `AttentionMaskConverter` is imported by name for a deprecated function that nobody calls.
    """
    module = ModuleType(MASKS)
    module._prepare_4d_causal_attention_mask = causal_mask  # type: ignore[attr-defined]
    module._prepare_4d_causal_attention_mask_for_sdpa = (  # type: ignore[attr-defined]
        causal_mask_for_sdpa
    )
    module._prepare_4d_attention_mask = padding_mask  # type: ignore[attr-defined]
    module.AttentionMaskConverter = type(  # type: ignore[attr-defined]
        "AttentionMaskConverter", (), {}
    )
    return module


def _cache_class() -> type:
    """A `DynamicCache` that still turns into tuples of keys and values and back."""
    from transformers.cache_utils import DynamicCache

    class TupleCache(DynamicCache):
        @classmethod
        def from_legacy_cache(cls, past: Any = None) -> TupleCache:
            cache = cls()
            for layer, (keys, values) in enumerate(past or ()):
                cache.update(keys, values, layer)
            return cache

        def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
            return tuple((layer.keys, layer.values) for layer in self.layers)

        def get_usable_length(self, new_length: int, layer_idx: int = 0) -> int:
            return self.get_seq_length(layer_idx)

    return TupleCache


@contextlib.contextmanager
def old_names() -> Iterator[None]:
    """While open, names that transformers v5 dropped can be imported; those it has are left alone.

    - `utils.import_utils.is_torch_fx_available`: asked before a function is wrapped for tracing by
      torch.fx. Nobody traces here: False.
    - `modeling_attn_mask_utils`: masks, see `_mask_module`.
    - `cache_utils.DynamicCache`: its tuple form, see `_cache_class`. Code of that age asks for it
      whenever it may cache, even for a single forward.
    """
    utilities = importlib.import_module("transformers.utils.import_utils")
    caches = importlib.import_module("transformers.cache_utils")
    with contextlib.ExitStack() as stack:
        if not hasattr(utilities, "is_torch_fx_available"):
            utilities.is_torch_fx_available = lambda: False  # type: ignore[attr-defined]
            stack.callback(delattr, utilities, "is_torch_fx_available")
        if MASKS not in sys.modules and importlib.util.find_spec(MASKS) is None:
            sys.modules[MASKS] = _mask_module()
            stack.callback(sys.modules.pop, MASKS)
        current = caches.DynamicCache
        if not hasattr(current, "from_legacy_cache"):
            caches.DynamicCache = _cache_class()  # type: ignore[attr-defined]
            stack.callback(setattr, caches, "DynamicCache", current)
        yield


def is_old(error: ImportError) -> bool:
    """Whether an import failed for one of the names that `old_names` offers."""
    return MASKS in (error.name or "") or "is_torch_fx_available" in str(error)


def mend(cls: Any) -> type:
    """Makes up to remote code for two changes of v5, in its own classes.

    - Its configuration's `rope_scaling` is what it was (`_old_rope_scaling`). transformers holds a
      model's configuration and its code in copies of their own, so the class that the code names is
      not the one that it gets: it is known when a model is made.
    - `_tied_weights_keys`, once a list of what may be tied to the embeddings, names them, as saving
      a model needs.
    """
    tied = getattr(cls, "_tied_weights_keys", None)
    if isinstance(tied, list):
        cls._tied_weights_keys = dict.fromkeys(tied, f"{cls.base_model_prefix}.embed_tokens.weight")
    make = cls.__init__

    @functools.wraps(make)
    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        _old_rope_scaling(type(config))
        make(self, config, *args, **options)

    if issubclass(cls, nn.Module):
        cls.__init__ = __init__
    return cls


def _old_rope_scaling(config: Any) -> None:
    """`rope_scaling` of a remote configuration: None, or a dictionary with a "type".

    In v5 it is another name of `rope_parameters`, which also hold the base and are never None.
    """
    if config.__module__.split(".")[0] != REMOTE or "rope_scaling" in vars(config):
        return
    base: Any = inspect.getattr_static(config, "rope_scaling")

    def get(self: Any) -> dict[str, Any] | None:
        parameters = self.rope_parameters
        if not parameters or parameters.get("rope_type", "default") == "default":
            return None
        return {**parameters, "type": parameters["rope_type"]}

    config.rope_scaling = property(get, base.fset)


def restore_buffers(model: PreTrainedModel) -> None:
    """Computes the buffers of remote code that no checkpoint holds (rotary frequencies) again.

    `from_pretrained` builds models without memory and then asks each module to initialise such
    buffers by a method that code of 2024 does not have: they hold whatever the memory held. Here
    the model is built once more, with real buffers and no weights, and they are copied over.

    Args:
        model: A loaded model; models of transformers' own code are left alone.
    """
    if not model.is_remote_code():
        return
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    if model.dtype.is_floating_point:
        torch.set_default_dtype(model.dtype)  # as when it was built
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            fresh = type(model)(model.config)
    finally:
        torch.set_default_dtype(before)
    for path, module in fresh.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            place = _submodule(model, path)
            held = None if place is None else place._buffers.get(name)
            if place is not None and buffer is not None and held is not None:
                place._buffers[name] = buffer.to(held.device)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None  # replaced by a module of terms
