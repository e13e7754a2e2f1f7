"""Which of a source's tensors become which of the model's parameters, and filling them in.

Both questions are answered by transformers' own conversion (`core_model_loading`): it renames,
stacks and fuses what a checkpoint holds into what the modules hold. The map is made from headers,
by sending meta tensors through that very conversion, so it cannot disagree with loading.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source, TensorInfo

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class WeightMap:
    """The tensors of a source, by what they become.

    Attributes:
        targets: Source tensor → the names of the model's tensors that it feeds.
        unread: Source tensors that transformers does not read (multi-token prediction heads ...).
        tied: Source tensors that repeat another one by the model's weight tying.
    """

    targets: dict[str, tuple[str, ...]]
    unread: tuple[str, ...]
    tied: tuple[str, ...]

    def below(self, prefix: str) -> list[str]:
        """Source tensors all of whose targets lie in the module `prefix`."""
        dotted = prefix + "."
        return [n for n, names in self.targets.items() if all(t.startswith(dotted) for t in names)]

    def outside(self, prefixes: Iterable[str]) -> list[str]:
        """Source tensors that feed at least one tensor outside the modules `prefixes`."""
        dotted = tuple(prefix + "." for prefix in prefixes)
        return [
            n for n, names in self.targets.items() if any(not t.startswith(dotted) for t in names)
        ]


def conversions(model: PreTrainedModel) -> list:
    """The weight conversions that loading this model applies."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences transformers' loading bar: layers load one by one, and we show our own progress."""
    from transformers.utils import logging as hf_logging

    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


def convert(model: PreTrainedModel, tensors: dict, device: str | torch.device) -> object:
    """Loads source tensors (lazy slices, real or meta tensors) into the model's modules.

    Returns transformers' loading info.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    dtype = model.config.dtype
    settings = LoadStateDictConfig(
        device_map={"": str(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=conversions(model),
    )
    with _quiet():
        info, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
    return info


def map_weights(model: PreTrainedModel, source: Source) -> WeightMap:
    """Maps a source's tensors to the model's, and checks them against the model's shapes.

    Args:
        model: A skeleton on meta.
        source: The directory that it was built from.

    Raises:
        CheckpointError: Names the tensor that is missing or whose shape contradicts config.json,
            with its file.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    state = model.state_dict()
    mapping = conversions(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    tied_names = dict(getattr(model, "all_tied_weights_keys", None) or {})

    targets: dict[str, tuple[str, ...]] = {}
    unread: list[str] = []
    tied: list[str] = []
    for name in source.tensors:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        found: tuple[str, ...] = (renamed,)
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            found += tuple(renamed.replace(first, other) for other in others)
        found = tuple(target for target in found if target in state)
        if not found:
            unread.append(name)
        elif all(target in tied_names for target in found) and _has_origin(
            found, tied_names, source, model
        ):
            tied.append(name)
        else:
            targets[name] = found
    _check(model, source, targets, tied_names)
    return WeightMap(targets, tuple(unread), tuple(tied))


def _has_origin(
    found: tuple[str, ...], tied_names: dict[str, str], source: Source, model: PreTrainedModel
) -> bool:
    """Whether the tensors that `found` are tied to are in the source as well."""
    prefix = model.base_model_prefix + "."
    return all(
        any(n in source.tensors for n in (tied_names[t], tied_names[t].removeprefix(prefix)))
        for t in found
    )


def _check(
    model: PreTrainedModel,
    source: Source,
    targets: dict[str, tuple[str, ...]],
    tied_names: dict[str, str],
) -> None:
    """Sends meta tensors through the conversion; what is missing or misshapen is an error."""
    tensors = {
        name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for name, info in ((name, source.tensors[name]) for name in targets)
    }
    config_file = source.path / "config.json"
    # A conversion that fails logs the reason with a traceback before it is reported here.
    logger = logging.getLogger("transformers.core_model_loading")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        info = convert(model, tensors, "meta")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{config_file}: contradicts the tensors: {error}") from error
    finally:
        logger.setLevel(level)

    def sources_of(target: str) -> list[TensorInfo]:
        return [source.tensors[n] for n, names in targets.items() if target in names]

    for target, got, wanted in sorted(info.mismatched_keys):
        first = sources_of(target)[0]
        raise CheckpointError(
            f"{source.path / first.file}: tensor {first.name} gives {target} the shape "
            f"{tuple(got)}, but {config_file} says {tuple(wanted)}"
        )
    for target, reason in sorted(info.conversion_errors.items()):
        members = sources_of(target)
        where = source.path / members[0].file if members else source.path
        lines = [line for line in str(reason).strip().splitlines() if line.strip()]
        raise CheckpointError(
            f"{where}: the tensors of {target} do not fit together or are not complete: {lines[-1]}"
        )
    ignored = [*(model._keys_to_ignore_on_load_missing or [])]
    for target in sorted(info.missing_keys):
        if target in tied_names or any(re.search(pattern, target) for pattern in ignored):
            continue
        if re.search(r"rotary_emb|inv_freq", target):
            continue
        raise CheckpointError(f"{source.path}: no tensor for {target}; the checkpoint lacks it")


def fill(
    model: PreTrainedModel,
    source: Source,
    names: list[str],
    device: str | torch.device,
    module: torch.nn.Module | None = None,
) -> None:
    """Reads source tensors into the model's modules, on `device`, in the model's dtype.

    Args:
        model: The skeleton.
        source: Where the tensors are.
        names: Which to read.
        device: Where to put them.
        module: The module that holds all of them, if one does (checked for NaN alone).

    Raises:
        CheckpointError: A tensor holds NaN or infinity; names file and tensor.
    """
    with source.slices(names) as slices:
        convert(model, slices, device)
    _check_finite(module or model, source, names)


def _check_finite(module: torch.nn.Module, source: Source, names: list[str]) -> None:
    """Looks at the filled parameters; reads the source once more only to name the culprit."""
    loaded = [p for p in module.parameters() if p.device.type != "meta" and p.is_floating_point()]
    if all(bool(torch.isfinite(p).all()) for p in loaded):
        return
    for name in sorted(names):
        with source.slices([name]) as slices:
            tensor = slices[name][...]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise CheckpointError(
                f"{source.path / source.tensors[name].file}: tensor {name} holds {kind}"
            )


def empty(module: torch.nn.Module) -> None:
    """Sends a module's parameters and persistent buffers back to meta, freeing their memory."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = torch.empty_like(buffer, device="meta")
