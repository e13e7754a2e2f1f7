"""Our checkpoint format as a quantisation method of transformers, and its config.json.

Importing this module registers the format and our experts implementation.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, UserError, nearest
from ..terms import kinds, register_kind
from .experts import experts_forward
from .names import GUARD, IMPLEMENTATION, QUANT_METHOD, is_ours
from .owner import TermModule
from .remote import restore_buffers
from .resize import resize
from .swap import swap

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FORMAT_VERSION = 2


class MctkConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint.

    Args:
        format_version: Version of the format; newer ones than ours are refused.
        modules: Module path → type and term specs, see `swap`.
        experts: Layer path → how many experts it has and what is smaller for it, see `resize`;
            only layers that have not as many as config.json says.
        providers: Plugins that provide kinds of term which the modules hold.
        method: What made the checkpoint, for people to read.
        quant_method: "mctk".

    Raises:
        CheckpointError: The format is newer than this mctk, or a key has no known meaning.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        modules: Mapping[str, Any] | None = None,
        experts: Mapping[str, Any] | None = None,
        providers: Iterable[str] = (),
        method: Any = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if isinstance(format_version, bool) or not isinstance(format_version, int):
            raise CheckpointError(
                f"quantization_config.format_version: must be an integer, not {format_version!r}"
            )
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {format_version}, this mctk "
                f"({metadata.version('mctk')}) reads up to {FORMAT_VERSION}: install a newer mctk"
            )
        for key in unknown:
            known = ("format_version", "modules", "experts", "providers", "method", "quant_method")
            raise CheckpointError(f"quantization_config: unknown key '{key}'{nearest(key, known)}")
        for key, value in (("modules", modules), ("experts", experts)):
            if value is not None and not isinstance(value, Mapping):
                raise CheckpointError(
                    f"quantization_config.{key}: must map paths to entries, not {value!r:.200}"
                )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = dict(modules or {})
        self.experts = dict(experts or {})
        self.providers = list(providers)
        self.method = method

    def get(self, key: str, default: Any = None) -> Any:
        """Lets transformers read the object as the dict that config.json holds.

        It does so in `from_pretrained(..., config=model.config)`.
        """
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """The object as config.json has it."""
        values = copy.deepcopy(self.__dict__)
        if values["method"] is None:
            del values["method"]
        if not values["experts"]:
            del values["experts"]
        return values


class MctkHfQuantizer(HfQuantizer):
    """Swaps modules of terms into a model before its weights are loaded."""

    quantization_config: MctkConfig
    _files: list[str]

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what cannot be loaded: uncompressed models, kinds of missing plugins."""
        if not self.pre_quantized:
            raise UserError(
                "the model is not compressed, and loading does not compress it: use `mctk run`, "
                "then load the directory that it wrote, without quantization_config"
            )
        load_providers(self.quantization_config.providers)

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Sets the experts implementation: the first time that we see the model's config."""
        if is_ours(config._experts_implementation):
            config._experts_implementation = IMPLEMENTATION
        # transformers does not save the implementation. As an ordinary attribute it is saved.
        config.experts_implementation = GUARD
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UserError("compressed checkpoints cannot be loaded in tensor or expert parallel")
        self._files = checkpoint_files or []
        resize(model, self.quantization_config.experts)
        swap(model, self.quantization_config.modules)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """Leaves the conversions alone: the first point where they and the swapped model exist.

        transformers would fill tensors that the checkpoint lacks with random numbers, after
        a warning. Here it is an error.
        """
        conversions = super().update_weight_conversions(weight_conversions, model)
        files = [file for file in self._files if str(file).endswith(".safetensors")]
        if files:
            _check_complete(model, copy.deepcopy(conversions), files)
        return conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            if not isinstance(module, TermModule):
                continue
            try:
                module.check()
            except CheckpointError as error:
                raise CheckpointError(f"module {path}: {error}") from error
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)  # loading made them trainable
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [_sparing_terms(conversion) for conversion in conversions]
        restore_buffers(model)

    def is_serializable(self) -> bool:
        """A loaded model can be saved again, as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through terms, so adapters can be trained on top."""
        return True


def _sparing_terms(conversion: Any) -> Any:
    """A weight conversion that, undone on saving, leaves the tensors of terms under their names.

    Some families' patterns fit whatever has `gate_proj` or `up_proj` in its name: undone, they
    would take the terms of the two for halves of one tensor and drop one of them. What it does on
    loading stays: layers for multi-token prediction are loaded later, by the same conversions.

    Args:
        conversion: The conversion that loading applied.
    """
    kind: Any = type(conversion)

    class SparingTerms(kind):
        __slots__ = ()  # no attribute more: only then may an instance become one

        def reverse_transform(self) -> Any:
            undone = super().reverse_transform()
            pattern = undone.compiled_sources.pattern
            # What matched may end before the dot of `.terms_`, or with it.
            undone.compiled_sources = re.compile(rf"(?:{pattern})(?!(?:.*\.)?terms_)")
            return undone

    found = copy.copy(conversion)
    found.__class__ = SparingTerms
    return found


def _check_complete(model: PreTrainedModel, conversions: list, files: list[str]) -> None:
    from safetensors import safe_open
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state: Mapping[str, torch.Tensor] = model.state_dict()
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                if ".terms_" in name:
                    found.add(name)
                    for steps in ((renamings, converters), ([], [])):
                        found.add(
                            rename_source_key(name, *steps, model.base_model_prefix, state)[0]
                        )
    missing = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, TermModule)
        for name in [*module._parameters, *module._buffers]
        if f"{path}.{name}" not in found
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{Path(files[0]).parent}: holds no tensor {missing[0]}{more}")


def load_providers(providers: Iterable[str]) -> None:
    """Registers the kinds of term that plugins provide.

    Args:
        providers: Names of plugins: of their entry points, or of their distributions.

    Raises:
        CheckpointError: A plugin is not installed, or cannot be imported.
    """
    for provider in providers:
        if provider in kinds().values():
            continue
        points = [
            point
            for point in metadata.entry_points(group="mctk")
            if provider in (point.name, point.dist.name if point.dist else None)
        ]
        if not points:
            raise CheckpointError(
                f"the checkpoint holds terms of the plugin '{provider}', which is not installed: "
                "install it to load the checkpoint"
            )
        for point in points:
            try:
                plugin = point.load()
            except Exception as error:
                raise CheckpointError(
                    f"the checkpoint needs the plugin '{provider}', which cannot be imported: "
                    f"{type(error).__name__}: {error}"
                ) from error
            if hasattr(plugin, "kinds"):
                for kind in plugin.kinds():
                    register_kind(kind, provider=provider)


def checkpoint_config(
    source_config: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Any]],
    providers: Iterable[str] = (),
    method: Any = None,
    experts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the config.json of a compressed checkpoint.

    Args:
        source_config: The source's config.json; every key is kept.
        modules: Module path → type and term specs, see `swap`.
        providers: Plugins that provide kinds of term in them.
        method: What made the checkpoint, for people to read.
        experts: Layers with other numbers of experts, see `resize`.
    """
    quantization = MctkConfig(modules=modules, experts=experts, providers=providers, method=method)
    return {
        **source_config,
        "experts_implementation": GUARD,
        "quantization_config": quantization.to_dict(),
    }


def register() -> None:
    """Makes transformers know our format and our experts implementation; may be called again."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.quantizers import auto

    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(MctkConfig)
    auto.register_quantizer(QUANT_METHOD)(MctkHfQuantizer)
    for name in (IMPLEMENTATION, GUARD):
        ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


# Not left to the hook in `mctk`: when this module is imported before transformers, the hook runs
# in the middle of the imports above, when there is nothing to register yet.
register()
