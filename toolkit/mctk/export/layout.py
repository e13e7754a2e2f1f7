"""What an export will write, from config.json and headers: names, shapes, sizes, refusals.

Terms are multiplied back into the modules that the original has, and those are taken apart into the
tensors that its files have: transformers' own conversion, run backwards, knows their names and
whether experts are fused or an expert at a time. What comes of it is held against the conversion
that loading runs, so names that would not be found again are refused before weights are read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import (
    Source,
    TensorInfo,
    crowded,
    map_weights,
    without_predictors,
)
from ..checkpoint.fewer import ONE_EXPERT
from ..dtypes import stored_name
from ..errors import CheckpointError, UserError, brief
from ..models import BankSite, bank_sites, build, own_tensors
from ..runtime import TermModule
from ..sweep import StreamedModel
from ..terms import Bias, Term
from .refusals import check_biases, check_format, merged, notes_of_layer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

PREDICTORS = (
    "layers for multi-token prediction, which have more experts than config.json now says: left out"
)


@dataclass(frozen=True)
class Constants:
    """The experts of a layer that give a constant, whatever their input.

    Attributes:
        path: The path of the layer's experts, as the files have it.
        experts: How many the layer has, E.
        numbers: Which of them are constants.
    """

    path: str
    experts: int
    numbers: tuple[int, ...]

    def name(self, expert: int) -> str:
        """The name of the tensor [H] that holds an expert's constant."""
        return f"{self.path.rpartition('.')[0]}.expert_replacements.{expert}.value"


@dataclass(frozen=True)
class LayerLayout:
    """What becomes of one decoder layer.

    Attributes:
        modules: Path in the layer of each module of terms → the dtype its matrices are written in.
        copied: Source tensors that are written as they are.
        made: Tensors that are multiplied out, by name.
        constants: Of an expert substitution the experts that are constants; None otherwise.
    """

    modules: dict[str, torch.dtype]
    copied: list[str]
    made: dict[str, TensorInfo]
    constants: Constants | None = None


@dataclass(frozen=True)
class Layout:
    """What an export will write.

    Attributes:
        model: The compressed model, streamed, in float32.
        dense: The original architecture on the meta device.
        layers: Layer by layer.
        outer: Source tensors outside of the layers, copied: embeddings and head, vision towers,
            what transformers does not read.
        config: The config.json.
        notes: What the user should know of it.
    """

    model: StreamedModel
    dense: PreTrainedModel
    layers: list[LayerLayout]
    outer: list[str]
    config: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors that will be written."""
        for names in (self.outer, *(layer.copied for layer in self.layers)):
            yield from (self.model.source.tensors[name] for name in names)
        for layer in self.layers:
            yield from layer.made.values()

    def term_modules(self) -> Iterator[TermModule]:
        """The modules that are multiplied out."""
        for layer, module in zip(self.layers, self.model.layers, strict=True):
            for path in layer.modules:
                found = module.get_submodule(path)
                assert isinstance(found, TermModule)
                yield found


def lay_out(
    source: Source,
    dtype: torch.dtype | None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    constants: bool = False,
) -> Layout:
    """Plans an export.

    Args:
        source: The compressed checkpoint.
        dtype: What multiplied matrices are written in; None: what their terms are stored in.
        device: Where layers will be multiplied out.
        trust_remote_code: Whether code that the directory carries may run.
        constants: Whether experts that give a constant may stay constants.

    Raises:
        UserError: The checkpoint has no terms, or what it computes cannot be said by the original
            architecture; names why and what to do instead.
        CheckpointError: The directory is damaged.
    """
    check_format(source)
    model = StreamedModel(source, device, "float32", trust_remote_code)
    config = copy.deepcopy(model.config)
    del config.quantization_config
    dense = build(config, torch.float32, trust_remote_code)
    path = model.layers_path
    layers, notes = [], []
    for index, (mine, original) in enumerate(
        zip(model.layers, dense.get_submodule(path), strict=True)
    ):
        prefix = f"{path}.{index}."
        modules = {
            name: _dtype(module, dtype)
            for name, module in mine.named_modules()
            if isinstance(module, TermModule)
        }
        fixed = _constants(mine, index) if constants else {}
        check_biases(mine, original, index, constants)
        notes += notes_of_layer(mine, index)
        gone = {
            f"{prefix}{name}.{tensor}"
            for name in modules
            for tensor, _ in _own(mine.get_submodule(name))
        }
        targets = model.weights.targets
        copied = [name for name in model.layer_tensors[index] if not gone.issuperset(targets[name])]
        made = {
            name: TensorInfo(name, "", stored_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in restored(dense, original, prefix, modules).items()
        }
        found = None
        if fixed:
            made, found = _with_constants(made, fixed, original, index)
        layers.append(LayerLayout(modules, copied, made, found))
    if constants and not any(layer.constants for layer in layers):
        raise UserError(
            f"{source.path}: no expert is a constant, so there is nothing to substitute; export it "
            "with --dense"
        )
    inside = {name for names in model.layer_tensors for name in names}
    outer = [name for name in source.tensors if name not in inside]
    settings = _config(source, dtype)
    predictors = _crowded_predictors(model)
    if predictors:
        outer = [name for name in outer if name not in predictors]
        settings = without_predictors(settings)
    said = merged(notes, len(layers)) + ([PREDICTORS] if predictors else [])
    layout = Layout(model, dense, layers, outer, settings, said)
    _check_names(layout, whole=not constants)
    return layout


def restored(
    dense: PreTrainedModel, layer: nn.Module, prefix: str, modules: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The tensors of some of a layer's modules as the original's files have them.

    Args:
        dense: The model of the original architecture.
        layer: Its layer; the modules may be filled or on meta.
        prefix: The layer's path and a dot.
        modules: Path in the layer → dtype of the matrices.
    """
    from transformers.core_model_loading import revert_weight_conversion

    sites = [site for site in bank_sites(layer).values() if site.module in modules]
    state = {}
    for site in sites:
        module = layer.get_submodule(site.module)
        for name in own_tensors(layer, site):
            owner, _, key = name.rpartition(".")
            tensor = getattr(module.get_submodule(owner), key).detach()
            if tensor.is_floating_point():
                tensor = tensor.to(modules[site.module])
            state[f"{prefix}{site.module}.{name}"] = tensor
    return revert_weight_conversion(dense, state)


def _own(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """What a module of terms holds itself."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _dtype(module: TermModule, wanted: torch.dtype | None) -> torch.dtype:
    """What a module's matrices are written in."""
    if wanted is not None:
        return wanted
    stored = [
        getattr(torch, entry["dtype"])
        for specs in module.specs.values()
        for spec in specs
        for entry in spec["tensors"].values()
    ]
    floating = [dtype for dtype in stored if dtype.is_floating_point]
    return functools.reduce(torch.promote_types, floating, floating[0])


def _constants(layer: nn.Module, index: int) -> dict[str, tuple[BankSite, tuple[int, ...]]]:
    """The members of a layer's experts whose output no input changes, by the experts' path.

    Raises:
        UserError: A constant stands where it cannot be told from a bias of an expert that stays, or
            all experts of the layer are constants.
    """
    sites = bank_sites(layer)
    found = {}
    for name, site in sites.items():
        module = layer.get_submodule(site.module)
        if not isinstance(module, TermModule) or site.part != "down":
            continue
        terms = module.terms(site.part)
        held = [term for term in terms if isinstance(term, Bias)]
        if not held:
            continue
        bare = {e for e in range(site.shape.members) if not any(_weighs(t, e) for t in terms)}
        served = {e for e in range(site.shape.members) if any(term.has(e) for term in held)}
        if served - bare:
            raise UserError(
                f"layer {index}: {name} holds biases beside matrices, which an expert substitution "
                "cannot say; serve it in mctk's format"
            )
        if len(bare) == site.shape.members:
            raise UserError(f"layer {index}: all experts are constants; one has to stay")
        found[site.module] = (site, tuple(sorted(bare)))
    return found


def _weighs(term: Term, member: int) -> bool:
    return term.has(member) and not isinstance(term, Bias)


def _with_constants(
    made: dict[str, TensorInfo],
    fixed: Mapping[str, tuple[BankSite, tuple[int, ...]]],
    original: nn.Module,
    index: int,
) -> tuple[dict[str, TensorInfo], Constants]:
    """A layer's tensors without those of constant experts, and with their constants."""
    if len(fixed) > 1:
        raise UserError(f"layer {index}: has several groups of experts; not supported")
    [(module, (site, numbers))] = fixed.items()
    matches = {name: ONE_EXPERT.match(name) for name in made}
    paths = {match[1] for match in matches.values() if match is not None}
    listed = [name for name, match in matches.items() if match is not None]
    if len(paths) != 1 or len({ONE_EXPERT.sub(r"\2", name) for name in listed}) != (
        site.shape.members
    ):
        raise UserError(
            f"layer {index}: the files of {type(original).__name__} hold {module} fused, and the "
            "layout of expert substitutions is known only for one tensor an expert; serve it in "
            "mctk's format"
        )
    constants = Constants(paths.pop(), site.shape.members, numbers)
    kept = {
        name: info
        for name, info in made.items()
        if matches[name] is None or int(matches[name][2]) not in numbers  # type: ignore[index]
    }
    like = made[listed[0]]
    for number in numbers:
        name = constants.name(number)
        kept[name] = TensorInfo(name, "", like.dtype, (site.shape.out_features,))
    return kept, constants


def _crowded_predictors(model: StreamedModel) -> tuple[str, ...]:
    """The tensors of layers for multi-token prediction, if they have too many experts.

    They are built with the number that config.json has for all; where experts were removed from the
    other layers, theirs are as many as before.
    """
    counts = [
        site.shape.members
        for layer in model.layers
        for site in bank_sites(layer).values()
        if site.part == "down"
    ]
    return crowded(model.source, model.unread, max(counts)) if counts else ()


def _config(source: Source, dtype: torch.dtype | None) -> dict[str, Any]:
    """The source's config.json without our keys."""
    config = {
        key: value
        for key, value in source.config.items()
        if key not in ("quantization_config", "experts_implementation")
    }
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    return config


def _check_names(layout: Layout, whole: bool) -> None:
    """Checks that loading would find every tensor of the original architecture again.

    Args:
        layout: What would be written.
        whole: Whether nothing may be missing; else (experts that are constants) only that no two
            tensors have one name.
    """
    source = layout.model.source
    infos = list(layout.tensors)
    written = {info.name: info for info in infos}
    if len(written) < len(infos):
        raise UserError(f"{source.path}: two tensors would have one name; not supported")
    if not whole:
        return
    try:
        found = map_weights(layout.dense, source.pretended(written, layout.config))
    except (UserError, CheckpointError) as error:
        raise UserError(
            f"{source.path}: the names of the original's tensors are not known: {brief(error)}"
        ) from error
    lost = [name for layer in layout.layers for name in layer.made if name in found.unread]
    if lost:
        raise UserError(f"{source.path}: transformers would not read {lost[0]}; not supported")
