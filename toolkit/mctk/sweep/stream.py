"""A model that is never whole in memory: embeddings and head stay, decoder layers come and go.

Every layer's `forward` is replaced while the model's own forward runs, so masks, positions,
scaling and whatever else a family passes to its layers is the family's own doing (DESIGN §4).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint import Source, check_tied, empty, fill, map_weights
from ..errors import UserError
from ..models import build, find_layers, load_config, resolve_dtype


@dataclass(frozen=True)
class LayerCall:
    """What the model passed to one layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal, tensors by value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    try:
        return bool(a is b or a == b)
    except (RuntimeError, ValueError):  # objects that compare to something without a truth value
        return False


def _share(new: Any, old: Any) -> Any:
    """Replaces tensors of `new` that equal those at the same place in `old` by the old ones.

    Batches of one shape have the same masks and positions; kept once, they cost nothing.
    """
    if isinstance(new, torch.Tensor):
        return old if isinstance(old, torch.Tensor) and same(new, old) else new
    if isinstance(new, tuple | list) and isinstance(old, tuple | list) and len(new) == len(old):
        return type(new)(_share(a, b) for a, b in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    return new


class _Indexed(Exception):
    """A model took what a layer returned for a tuple."""


class _Passed(Exception):
    """A model passed what a layer returned to the next layer."""


class _Probe:
    """Stands for what a layer returns, to see what a model does with it."""

    def __getitem__(self, index: Any) -> Any:
        raise _Indexed


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
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.layers_path, self.layers = find_layers(self.model)
        self._tuples: bool | None = None  # whether the model expects tuples of its layers
        self.weights = map_weights(self.model, source)
        extra = getattr(self.config.get_text_config(), "num_nextn_predict_layers", None) or 0
        self.layer_tensors, self.outer_tensors = self.weights.place(
            self.layers_path, len(self.layers), extra
        )

    def load_outer(self) -> None:
        """Reads what is not in a decoder layer: embeddings, final norm, head.

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

    @contextlib.contextmanager
    def replaced(self, forward: Callable[[int, torch.Tensor, LayerCall], Any]) -> Iterator[None]:
        """While open, the model's forward calls `forward(index, hidden, call)` for each layer.

        Hidden states that it returns get to the model as its own layers return them: code of 2024
        expects a tuple.
        """
        if self._tuples is None:
            self._tuples = False  # the next line comes here again
            self._tuples = self._expects_tuples()
        tuples = self._tuples

        def stand_in(index: int) -> Callable:
            def call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                output = forward(index, hidden_states, LayerCall(args, kwargs))
                return (output,) if tuples and isinstance(output, torch.Tensor) else output

            return call

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)  # an instance attribute: shadows the class's method
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _expects_tuples(self) -> bool:
        """Whether the model takes the hidden states out of a tuple that each layer returns."""

        def answer(index: int, hidden: torch.Tensor, call: LayerCall) -> _Probe:
            if index:
                raise _Passed
            return _Probe()

        with self.replaced(answer):
            try:
                self._forward(torch.zeros(1, 1, dtype=torch.int64))
            except _Indexed:
                return True
            except Exception:  # a lone layer's probe goes on to the norm, which cannot take it
                return False
        return False

    def run_layer(self, index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Runs one filled layer's own forward on hidden states [B, T, H].

        Raises:
            UserError: The layer returns more than hidden states; carrying those on would need
                family code, and dropping them would be silently wrong.
        """
        layer = self.layers[index]
        output = type(layer).forward(layer, hidden, *call.args, **call.kwargs)
        return hidden_of(output, type(layer).__name__)

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Runs the model's forward with pass-through layers.

        Args:
            ids: Token ids [B, T].

        Returns:
            The hidden states that enter layer 0 and, per layer, what else it was passed.
        """
        calls: list[LayerCall] = []
        first: list[torch.Tensor] = []

        def record(index: int, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
            if index != len(calls):
                raise UserError(f"{type(self.model).__name__}: does not call its layers in order")
            if index == 0:
                first.append(hidden)
            calls.append(call)
            return hidden

        with self.replaced(record):
            self._forward(ids, last_only=True)
        if len(calls) != len(self.layers):
            raise UserError(f"{type(self.model).__name__}: calls only {len(calls)} of its layers")
        return first[0], calls

    def head(self, ids: torch.Tensor, hidden: torch.Tensor, grad: bool = False) -> torch.Tensor:
        """Turns the last layer's output [B, T, H] into logits [B, T, V], as the model does it.

        Args:
            ids: Token ids [B, T].
            hidden: The last layer's output.
            grad: Whether gradients are recorded.
        """

        def give(index: int, entering: torch.Tensor, call: LayerCall) -> torch.Tensor:
            return hidden if index == len(self.layers) - 1 else entering

        with self.replaced(give):
            return self._forward(ids, grad=grad)

    def _forward(
        self, ids: torch.Tensor, last_only: bool = False, grad: bool = False
    ) -> torch.Tensor:
        # Where only the layers' arguments matter, the head need not run over every token.
        keep = {"logits_to_keep": 1} if last_only and self._keeps_logits else {}
        with torch.set_grad_enabled(grad):
            return self.model(input_ids=ids.to(self.device), use_cache=False, **keep).logits


def hidden_of(output: Any, name: str) -> torch.Tensor:
    """The hidden states that a layer returned.

    Raises:
        UserError: It returned something else besides.
    """
    if isinstance(output, torch.Tensor):
        return output
    extra = [x for x in output[1:] if x is not None] if isinstance(output, tuple) else [output]
    if extra or not isinstance(output[0], torch.Tensor):
        raise UserError(f"{name}: passes more than hidden states to the next layer; not supported")
    return output[0]


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


def share_calls(calls: list[LayerCall], earlier: list[LayerCall] | None) -> list[LayerCall]:
    """Keeps the tensors of an earlier batch's calls where a new batch's are equal to them.

    Within one batch, too, layers are mostly passed the same objects; those stay shared.
    """
    if earlier is None:
        return calls
    return [
        LayerCall(_share(new.args, old.args), _share(new.kwargs, old.kwargs))
        for new, old in zip(calls, earlier, strict=True)
    ]
