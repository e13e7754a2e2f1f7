"""A model that is never whole in memory: embeddings and head stay, decoder layers come and go.

Every layer's `forward` is replaced while the model's own forward runs, so masks, positions,
scaling and whatever else a family passes to its layers is the family's own doing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..checkpoint import (
    Source,
    Unread,
    check_tied,
    empty,
    extra_layers,
    fill,
    find_unread,
    map_weights,
)
from ..errors import UserError
from ..models import (
    build,
    find_layers,
    language_part,
    load_config,
    resolve_dtype,
    side_parts,
)
from .passed import LayerCall, Passed, describe, mapping_after, read_mapping
from .wiring import Wiring, stand_ins, trace_wiring


class StreamedModel:
    """A checkpoint as a model with one decoder layer in memory at a time.

    Works for original and for compressed checkpoints alike.

    Args:
        source: The model directory.
        device: Where layers compute ("cpu", "cuda:0").
        dtype: Compute dtype, by torch's name or "auto" for the checkpoint's.
        trust_remote_code: Whether the directory's own code may run.

    Raises:
        CheckpointError: The directory is damaged or contradicts itself.
        UserError: transformers cannot build the model.
    """

    def __init__(
        self,
        source: Source,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.config = load_config(source.path, source.config, trust_remote_code)
        self.dtype = resolve_dtype(dtype, self.config)
        self.model = build(self.config, self.dtype, trust_remote_code)
        self.language_path, self.language = language_part(self.model)
        known = inspect.signature(self.language.forward).parameters
        self._keeps_logits = "logits_to_keep" in known
        self.layers_path, self.layers = find_layers(self.model)
        self.weights = map_weights(self.model, source)
        extra = extra_layers(self.model, source.config, self.weights.unread, len(self.layers))
        self.layer_tensors, outer = self.weights.place(self.layers_path, len(self.layers), extra)
        self.side = side_parts(self.model, self.layers_path)
        # Source tensor → the part that it is of, where text alone never meets that part.
        self.side_tensors = {
            name: self.side[targets[0]]
            for name, targets in self.weights.targets.items()
            if all(target in self.side for target in targets)
        }
        self.outer_tensors = [name for name in outer if name not in self.side_tensors]

    def load_outer(self) -> None:
        """Reads what is not in a decoder layer: embeddings, final norm, head.

        Vision and audio towers stay on meta: text does not pass through them.

        Raises:
            CheckpointError: A tensor is damaged, or config.json ties tensors that differ.
        """
        check_tied(self.source, self.weights)
        fill(self.model, self.source, self.outer_tensors, self.device)
        self.model.tie_weights()
        for module in self.model.modules():
            for name in module._non_persistent_buffers_set:
                buffer = module._buffers.get(name)
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights; they are freed with the context."""
        module = self.layers[index]
        try:
            fill(self.model, self.source, self.layer_tensors[index], self.device, module)
            yield module
        finally:
            empty(module)
            _return_memory()

    @functools.cached_property
    def unread(self) -> Unread:
        """The source's tensors that transformers does not read with the model."""
        return find_unread(self.weights.unread, len(self.layers))

    @functools.cached_property
    def wiring(self) -> Wiring:
        """How the model's own forward uses what its layers return.

        Raises:
            UserError: Its layers cannot be streamed one by one.
        """
        return trace_wiring(self.language, self.layers)

    @contextlib.contextmanager
    def replaced(self, forward: Callable[[int, torch.Tensor, LayerCall], Any]) -> Iterator[None]:
        """While open, the model's forward calls `forward(index, hidden, call)` for each layer.

        Hidden states that it returns get to the model as its own layers return them: code of 2024
        expects a tuple.
        """
        elements = self.wiring.elements

        def stand_in(index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
            output = forward(index, hidden, call)
            if elements and isinstance(output, torch.Tensor):
                return (output, *[None] * (elements - 1))
            return output

        with stand_ins(self.layers, stand_in):
            yield

    def run_layer(self, index: int, passed: Passed, call: LayerCall) -> Passed:
        """Runs one filled layer's own forward on what passes to it.

        Args:
            index: The layer.
            passed: What the layers before it pass on.
            call: What the model passes it beside that.

        Raises:
            UserError: The layer returns what cannot be carried on.
        """
        layer = self.layers[index]
        hidden, call = self.arrive(index, passed, call)
        output = type(layer).forward(layer, hidden, *call.args, **call.kwargs)
        return self.leave(index, passed, call, output)

    def arrive(self, index: int, passed: Passed, call: LayerCall) -> tuple[torch.Tensor, LayerCall]:
        """The hidden states that a layer is passed, and what else.

        Where a family's layers are passed what others gave, the model's own forward runs up to the
        layer, with stand-ins for those before it; gradients pass through what it computes.
        """
        if call.ids is None:
            return passed.hidden, call

        def stand_in(at: int, hidden: torch.Tensor, own: LayerCall) -> Any:
            if at == index:
                raise _Arrived(hidden, own)
            return self.answer(at, hidden, own, passed, index)

        try:
            with self.replaced(stand_in):
                # Over all tokens: some models pass the later layers only those that the head needs.
                self._forward(call.ids, grad=torch.is_grad_enabled())
        except _Arrived as arrival:
            # Embeddings are the same whenever they are computed; gradients want the ones given.
            return arrival.hidden if index else passed.hidden, arrival.call
        raise UserError(f"{type(self.model).__name__}: does not call layer {index} every time")

    def answer(
        self, index: int, hidden: torch.Tensor, call: LayerCall, passed: Passed, boundary: int
    ) -> Any:
        """What the model gets of a layer that has run, from what passes a boundary after it.

        Args:
            index: The layer.
            hidden: Hidden states that the model passed it.
            call: What else.
            passed: What passes the boundary.
            boundary: The layer after the boundary.
        """
        more = passed.more
        first = passed.hidden if index == boundary - 1 else more.get(f"{index}.0", hidden)
        for name in self.wiring.shared & call.kwargs.keys():  # not every layer need be given it
            call.kwargs[name].update(read_mapping(more, f"{index}.{name}."))
        if not more:
            return first
        others = [more.get(f"{index}.{element}") for element in range(1, self.wiring.elements)]
        return (first, *others) if self.wiring.elements else first

    def leave(self, index: int, passed: Passed, call: LayerCall, output: Any) -> Passed:
        """What passes the boundary after a layer that has run.

        Args:
            index: The layer.
            passed: What passed the boundary before it.
            call: What it was passed, after it has run.
            output: What it returned.

        Raises:
            UserError: The layer returns what cannot be carried on.
        """
        name = f"{type(self.layers[index]).__name__}, layer {index}"
        wiring = self.wiring
        hidden, *others = elements_of(output, wiring.elements, name)
        found = {f"{index}.0": hidden, **passed.more}
        found |= {f"{index}.{number}": value for number, value in enumerate(others, 1)}
        if index:
            found[f"{index - 1}.0"] = passed.hidden
        more = {key: found[key] for key in wiring.live[index + 1] if found.get(key) is not None}
        for argument in wiring.shared:
            prefix = f"{index}.{argument}."
            earlier = {k: t for k, t in passed.more.items() if f".{argument}." in k}
            if argument not in call.kwargs:  # the layer has no part in it: it stays as it was
                more |= earlier
                continue
            more |= mapping_after(call.kwargs[argument], earlier, prefix, name)
        for key, value in more.items():
            if not isinstance(value, torch.Tensor) or value.shape[:1] != hidden.shape[:1]:
                raise UserError(
                    f"{name}: returns {describe(value)} beside hidden states ({key}), which a "
                    "later layer is passed; only tensors of as many sequences can be carried on"
                )
        return Passed(hidden, more)

    def embed(self, ids: torch.Tensor) -> tuple[Passed, list[LayerCall]]:
        """Runs the model's forward with pass-through layers.

        Args:
            ids: Token ids [B, T].

        Returns:
            What enters layer 0 and, per layer, what else it was passed.
        """
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
            if index == 0:
                first.append(hidden)
            calls.append(LayerCall((), {}, ids) if self.wiring.more else call)
            return hidden

        with self.replaced(record):
            self._forward(ids, last_only=True)
        return Passed(first[0]), calls

    def head(self, ids: torch.Tensor, passed: Passed, grad: bool = False) -> torch.Tensor:
        """Turns what the last layer passes on into logits [B, T, V], as the model does it.

        Args:
            ids: Token ids [B, T].
            passed: What passes the boundary after the last layer.
            grad: Whether gradients are recorded.
        """
        count = len(self.layers)

        def give(index: int, entering: torch.Tensor, call: LayerCall) -> Any:
            return self.answer(index, entering, call, passed, count)

        with self.replaced(give):
            return self._forward(ids, grad=grad)

    def _forward(
        self, ids: torch.Tensor, last_only: bool = False, grad: bool = False
    ) -> torch.Tensor:
        # Where only the layers' arguments matter, the head need not run over every token.
        keep = {"logits_to_keep": 1} if last_only and self._keeps_logits else {}
        with torch.set_grad_enabled(grad):
            return self.language(input_ids=ids.to(self.device), use_cache=False, **keep).logits


class _Arrived(Exception):
    """The model has called the layer that is waited for."""

    def __init__(self, hidden: torch.Tensor, call: LayerCall) -> None:
        super().__init__()
        self.hidden, self.call = hidden, call


def elements_of(output: Any, elements: int, name: str) -> list[Any]:
    """What a layer returned, as many elements as its model takes; the first are hidden states.

    Raises:
        UserError: It returned something else.
    """
    found = list(output) if isinstance(output, tuple) else [output]
    beside = [value for value in found[max(1, elements) :] if value is not None]
    if not isinstance(found[0], torch.Tensor) or beside:
        raise UserError(
            f"{name}: returns {describe(beside[0] if beside else output)} where its model's "
            "forward takes hidden states alone; not supported"
        )
    return found[: max(1, elements)]


@functools.cache
def _trimmer() -> Callable[[int], int] | None:
    """Glibc's `malloc_trim`; None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def _return_memory() -> None:
    """Gives a freed layer's memory back to the system.

    glibc keeps freed blocks of some megabytes, in an arena for each thread that ever loaded a
    tensor; over many layers the holes between them add up to another layer or more. And what
    listened to a layer hangs together in circles, with the layer's statistics: those wait for the
    garbage collector, which would come at its own time.
    """
    gc.collect()
    trim = _trimmer()
    if trim is not None:
        trim(0)
