"""Which of a source's tensors become which of the model's parameters, and filling them in.

Both questions are answered by transformers' own conversion (`core_model_loading`): it renames,
stacks and fuses what a checkpoint holds into what the modules hold. The map is made from headers,
by sending meta tensors through that very conversion, so it cannot disagree with loading.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..dtypes import torch_dtypes
from ..errors import CheckpointError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .source import Source, TensorInfo

TORCH_DTYPES = torch_dtypes()
UNQUANTISED = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class WeightMap:
    """The tensors of a source, by what they become.

    Attributes:
        targets: Source tensor → the names of the model's tensors that it feeds.
        unread: Source tensors that transformers does not read (multi-token prediction heads ...).
        tied: Source tensors that repeat another one by the model's weight tying → the other one.
    """

    targets: dict[str, tuple[str, ...]]
    unread: tuple[str, ...]
    tied: dict[str, str]

    def place(self, path: str, layers: int, extra: int = 0) -> tuple[list[list[str]], list[str]]:
        """Says where each source tensor belongs.

        Args:
            path: Path of the model's list of decoder layers.
            layers: How many there are.
            extra: How many layers of another kind (multi-token prediction) may follow them in the
                files, not read by transformers.

        Returns:
            Per layer the tensors that feed it, and the tensors that feed none.

        Raises:
            UserError: A tensor feeds several layers, or a layer and something outside.
            CheckpointError: The files hold more layers than config.json says.
        """
        inside = re.compile(rf"{re.escape(path)}\.(\d+)\.")
        by_layer: list[list[str]] = [[] for _ in range(layers)]
        outer: list[str] = []
        for name, targets in self.targets.items():
            found = [inside.match(target) for target in targets]
            homes = {None if match is None else int(match[1]) for match in found}
            if len(homes) > 1:
                raise UserError(f"{name}: feeds several layers at once; not supported")
            [home] = homes
            (outer if home is None else by_layer[home]).append(name)
        for name in self.unread:
            match = inside.match(name)
            if match is not None and int(match[1]) >= layers + extra:
                raise CheckpointError(
                    f"config.json says {layers} layers, and the files hold tensor {name}"
                )
        return by_layer, outer


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


def convert(model: PreTrainedModel, tensors: dict, device: str | torch.device) -> Any:
    """Loads source tensors (lazy slices, real or meta tensors) into the model's modules.

    Returns transformers' loading info.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        convert_and_load_state_dict_in_model,
    )
    from transformers.modeling_utils import LoadStateDictConfig

    dtype, mapping = model.config.dtype, conversions(model)
    if str(device) == "meta":
        for entry in mapping:
            if isinstance(entry, WeightConverter):
                entry.force_cpu = False  # where a GPU has no room to put a tensor together
    settings = LoadStateDictConfig(
        device_map={"": str(device)},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=mapping,
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
    tied: dict[str, str] = {}
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
            continue
        origin = _origin(found, tied_names, source, model)
        if origin is not None and origin != name:
            tied[name] = origin
        else:
            targets[name] = found
    _check(model, source, targets, tied_names)
    return WeightMap(targets, tuple(unread), tied)


def _origin(
    found: tuple[str, ...], tied_names: dict[str, str], source: Source, model: PreTrainedModel
) -> str | None:
    """The source tensor that the targets `found` are all tied to, if the source has it."""
    prefix = model.base_model_prefix + "."
    for target in found:
        for name in (tied_names.get(target, ""), tied_names.get(target, "").removeprefix(prefix)):
            if len(found) == 1 and name in source.tensors:
                return name
    return None


def _check(
    model: PreTrainedModel,
    source: Source,
    targets: dict[str, tuple[str, ...]],
    tied_names: dict[str, str],
) -> None:
    """Sends meta tensors through the conversion; what is missing or misshapen is an error."""
    config_file = source.path / "config.json"
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, names in targets.items():
        kind = source.tensors[name].dtype
        if kind not in UNQUANTISED and any(state[target].is_floating_point() for target in names):
            raise CheckpointError(
                f"{source.path / source.tensors[name].file}: tensor {name} is quantised ({kind}); "
                "give a bfloat16, float16 or float32 version of the model"
            )
    tensors = {
        name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for name, info in ((name, source.tensors[name]) for name in targets)
    }
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

    for target, got, expected in sorted(info.mismatched_keys):
        members = sources_of(target)
        _check_members(source, members, expected[0] if len(expected) else 0)
        raise CheckpointError(
            f"{source.path / members[0].file}: tensor {members[0].name} gives {target} the shape "
            f"{tuple(got)}, but {config_file} says {tuple(expected)}"
        )
    for target, reason in sorted(info.conversion_errors.items()):
        members = sources_of(target)
        _check_members(source, members, wanted[target][0] if wanted.get(target) else 0)
        where = source.path / members[0].file if members else source.path
        shapes = sorted({str(list(member.shape)) for member in members})
        raise CheckpointError(
            f"{where}: tensor {members[0].name if members else target} and the others of {target} "
            f"do not fit together or are not complete: {len(members)} tensors of shape "
            f"{', '.join(shapes)}: {_last_line(reason)}"
        )
    ignored = [*(model._keys_to_ignore_on_load_missing or [])]
    for target in sorted(info.missing_keys):
        if target in tied_names or any(re.search(pattern, target) for pattern in ignored):
            continue
        if re.search(r"rotary_emb|inv_freq", target):
            continue
        raise CheckpointError(
            f"{source.path}: no tensor for {target}, which {config_file} asks for; the checkpoint "
            "lacks it"
        )


def _check_members(source: Source, members: list[TensorInfo], count: int) -> None:
    """Checks that the tensors stacked into one parameter are numbered 0 to `count` - 1.

    Args:
        source: The directory.
        members: All tensors that feed the parameter; nothing is checked unless they differ by a
            number in their names (an expert's).
        count: How many the model stacks.

    Raises:
        CheckpointError: Names the first that is missing or too many, and how many there are.
    """
    kinds: dict[str, dict[int, TensorInfo]] = {}  # name with {} for the expert → expert → tensor
    for member in members:
        match = re.search(r"^(.*\.)(\d+)(\..*)$", member.name)  # the last number of the name
        if match is None:
            return
        kinds.setdefault(f"{match[1]}{{}}{match[3]}", {})[int(match[2])] = member
    if all(len(experts) == 1 for experts in kinds.values()):
        return  # the number is the layer's: one tensor, nothing stacked
    config_file = source.path / "config.json"
    missing = [
        kind.format(expert)
        for expert in range(count)
        for kind, experts in sorted(kinds.items())
        if expert not in experts
    ]
    if missing:
        file = next(iter(next(iter(kinds.values())).values())).file
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{source.path / file}: tensor {missing[0]}{more} is missing; {config_file} asks for "
            f"{count} experts"
        )
    for _, experts in sorted(kinds.items()):
        usual = Counter(member.shape for member in experts.values()).most_common(1)[0][0]
        for expert, member in sorted(experts.items()):
            if expert >= count:
                raise CheckpointError(
                    f"{source.path / member.file}: tensor {member.name} is one too many; "
                    f"{config_file} asks for {count} experts"
                )
            if member.shape != usual:
                raise CheckpointError(
                    f"{source.path / member.file}: tensor {member.name} has shape "
                    f"{list(member.shape)}, the other experts' have {list(usual)}"
                )


def _last_line(reason: object) -> str:
    lines = [line for line in str(reason).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"


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
        CheckpointError: A tensor cannot be read or holds NaN or infinity; names file and tensor.
    """
    with source.slices(names, device) as slices:
        info = convert(model, slices, device)
    for target, reason in sorted(info.conversion_errors.items()):
        raise CheckpointError(
            f"{source.path}: {target} cannot be read, though its headers were in order when the "
            f"model was opened: {_last_line(reason)}"
        )
    _check_finite(module or model, source, names, model.dtype)


def _check_finite(
    module: torch.nn.Module, source: Source, names: list[str], dtype: torch.dtype
) -> None:
    """Looks at the filled tensors; reads the source once more only to name the culprit."""
    if all(_finite(t) for t in itertools.chain(module.parameters(), module.buffers())):
        return
    for name in sorted(names):
        with source.slices([name]) as slices:
            tensor = slices[name][...]
        where = f"{source.path / source.tensors[name].file}: tensor {name}"
        if not _finite(tensor):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise CheckpointError(f"{where} holds {kind}")
        if tensor.is_floating_point() and not _finite(tensor.to(dtype)):
            raise CheckpointError(f"{where} overflows in {str(dtype).removeprefix('torch.')}")
    # Else it is a buffer that the model computed itself, masks of -inf among them.


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; matrix by matrix, so that stacked experts need no mask."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    if tensor.dim() > 2:
        return all(_finite(part) for part in tensor)
    return bool(torch.isfinite(tensor).all())


def check_tied(source: Source, weights: WeightMap) -> None:
    """Checks that tensors stored twice because the model ties them are equal.

    transformers leaves them apart where they differ, whatever config.json says; we drop the second,
    so they must be the same.

    Raises:
        CheckpointError: They are not; names both.
    """
    for name, origin in weights.tied.items():
        with source.slices([name, origin]) as slices:
            equal = torch.equal(slices[name][...], slices[origin][...])
        if not equal:
            raise CheckpointError(
                f"{source.path / source.tensors[name].file}: tensor {name} differs from {origin}, "
                "though config.json ties them; set tie_word_embeddings to false"
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
