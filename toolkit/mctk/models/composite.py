"""Models of several modalities: which class opens a checkpoint, and which part of it reads text.

A checkpoint that also sees or hears comes with nested configurations and, in its config.json, the
name of a class that holds everything. transformers' `AutoModelForCausalLM` does not know some of
those types, and of others builds the text model alone, which would leave the rest of the tensors
behind. So the class that config.json names decides which Auto class opens it, for us and for
whoever loads the result. There is no table of types: transformers' own registries are asked.

Compression works on the text model's decoder layers. What text alone never meets (vision and audio
towers, projectors, a talker) are *side modules*: counted, copied, never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Auto classes whose models turn token ids into logits of the next token, the narrowest first."""
# The words that modules for tokens of images and sound are called by.
_OTHER_SENSE = re.compile(r"(^|[._])(vision|visual|image|audio)([._]|$)")


def auto_class_name(config: PretrainedConfig) -> str:
    """The Auto class that loads what a configuration's `architectures` name.

    Where they name nothing that transformers knows (the key may be missing, or be of other code):
    an Auto class for which the checkpoint brings code, then the first whose model is built from the
    whole configuration and not from its text part alone.

    Raises:
        UserError: transformers knows no causal language model of this type.
    """
    known = {name: _classes(config, name) for name in AUTO_CLASSES}
    named = set(getattr(config, "architectures", None) or ())
    for name, classes in known.items():
        if named & {cls.__name__ for cls in classes}:
            return name
    remote = getattr(config, "auto_map", None) or {}
    for name in AUTO_CLASSES:
        if name in remote:
            return name
    for name, classes in known.items():
        if any(isinstance(config, getattr(cls, "config_class", ())) for cls in classes):
            return name
    if not any(known.values()):
        called = f" ({', '.join(sorted(named))})" if named else ""
        raise UserError(
            f"{config.model_type}{called} is not a causal language model: transformers has no "
            "class of this type that writes token by token, and other models cannot be compressed"
        )
    return AUTO_CLASSES[0]


def _classes(config: PretrainedConfig, auto: str) -> tuple[type, ...]:
    """The model classes that an Auto class may build of a configuration.

    Only those that write token by token: some Auto classes also know models that denoise blocks.
    """
    import transformers

    mapping = getattr(transformers, auto)._model_mapping
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    classes = tuple(found) if isinstance(found, list | tuple) else (found,)
    return tuple(cls for cls in classes if issubclass(cls, transformers.GenerationMixin))


def auto_class(config: PretrainedConfig) -> Any:
    """The class itself; see `auto_class_name`."""
    import transformers

    return getattr(transformers, auto_class_name(config))


def language_part(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """The part that turns token ids into logits, and its path: mostly "" and the model itself.

    A model of several speakers (one writes, another talks) only holds them and has no forward of
    its own; the writer is the one whose text configuration is the model's.

    Raises:
        UserError: No part of the model, or more than one, reads and writes text.
    """
    from transformers import PreTrainedModel

    if _runs(model):
        return "", model
    text = type(model.config.get_text_config())
    parts = [
        (name, part)
        for name, part in model.named_children()
        if isinstance(part, PreTrainedModel)
        and _runs(part)
        and type(part.config.get_text_config()) is text
        and part.get_output_embeddings() is not None
    ]
    if len(parts) != 1:
        raise UserError(
            f"{type(model).__name__}: has no forward of its own, and {len(parts)} of its parts "
            "turn token ids into logits; not supported"
        )
    return parts[0]


def _runs(model: nn.Module) -> bool:
    """Whether a module's class has a forward; `nn.Module`'s own only raises."""
    return type(model).forward is not nn.Module.forward


def text_model_path(model: PreTrainedModel, inner: str) -> str:
    """Path of the innermost model around a module: of the text model, if it is a decoder layer's.

    Args:
        model: The whole model.
        inner: The module's path.
    """
    from transformers import PreTrainedModel

    path = inner
    while path:
        path = path.rpartition(".")[0]
        if isinstance(model.get_submodule(path), PreTrainedModel):
            return path
    return ""


def is_of_other_sense(path: str) -> bool:
    """Whether a module of a decoder layer, by its path there, sees tokens of images or sound alone.

    ERNIE-4.5-VL has such experts beside those for text, of the same class: only their names tell.
    Text says nothing of them, so they are no banks.
    """
    return _OTHER_SENSE.search(path) is not None


def side_parts(model: PreTrainedModel, layers_path: str) -> dict[str, str]:
    """The model's tensors that text alone never meets, each with the part that holds it.

    In a model whose text model has a configuration of its own, that is everything but the text
    model, the embeddings and the head; and of its layers what works on other tokens. A model of
    one configuration has none.

    Args:
        model: The whole model (meta is enough).
        layers_path: Path of its decoder layers.

    Returns:
        Tensor's name → path of its part: of the outermost module that holds nothing of the text
        model ("model.visual"), a layer's number left out ("model.layers.*.mlp.vision_moe").
    """
    text = text_model_path(model, layers_path)
    if type(model.get_submodule(text).config) is type(model.config):
        return {}
    _, language = language_part(model)
    ends = [language.get_input_embeddings(), language.get_output_embeddings()]
    paths = {id(module): path for path, module in model.named_modules()}
    used = [text, *(paths[id(end)] for end in ends if end is not None)]
    found: dict[str, str] = {}
    for name in model.state_dict():
        if any(name.startswith(path + ".") for path in used):
            part = _sense_in_layer(name, layers_path)
        else:
            part = next(p for p in _outwards(name) if not any(f"{u}.".startswith(p) for u in used))
        if part is not None:
            found[name] = part.rstrip(".")
    return found


def _sense_in_layer(name: str, layers_path: str) -> str | None:
    """The part of a decoder layer, its number left out, that holds a tensor and is not for text."""
    if not name.startswith(layers_path + "."):
        return None
    inner = name.removeprefix(layers_path + ".").partition(".")[2]
    part = next((part for part in _outwards(inner) if is_of_other_sense(part)), None)
    return None if part is None else f"{layers_path}.*.{part}"


def _outwards(name: str) -> Iterator[str]:
    """A tensor's modules from the outermost to its own, each with a dot; then its own name."""
    words = name.split(".")
    yield from (".".join(words[:length]) + "." for length in range(1, len(words)))
    yield name
