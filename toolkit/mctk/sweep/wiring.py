"""How a model's own forward uses what its layers return: found out once, before weights are read.

The forward runs over two tokens with every decoder layer replaced by a stand-in. What a stand-in
returns is marked, and the marks are looked for in what later layers are passed and in the logits:
a tensor that the model hands on is recognised itself, one that it computes by its gradients' graph.
No family is known by name. What this overlooks (a dependence without gradients) is caught by the
first batch, which also goes through the model's own forward (`forward`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError, brief
from .passed import LayerCall, tensors_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StandIn = Callable[[int, torch.Tensor, LayerCall], Any]
MOST_ELEMENTS = 8  # of a tuple that a layer returns


@dataclass(frozen=True)
class Wiring:
    """What a model's forward makes of what its layers return.

    Attributes:
        elements: How many elements the model unpacks from what a layer returns; 1 if it takes the
            first of a tuple, 0 if layers return a tensor.
        live: Per boundary (before layer 0, 1 ... and after the last), the names of what passes it
            beside hidden states, as `passed` has them; without what is in `shared`.
        shared: The arguments that are one mapping for several layers to write into.
        computed: Whether any other argument of a layer is or comes from what layers returned.
        width: Bytes of the hidden states of one token, all streams of them.
    """

    elements: int
    live: tuple[frozenset[str], ...]
    shared: frozenset[str]
    computed: bool
    width: int

    @property
    def more(self) -> bool:
        """Whether layers are passed anything but hidden states that others have to do with."""
        return self.computed or bool(self.shared) or any(self.live)

    def passing(self) -> int:
        """Bytes of one token that pass a boundary at the most, for estimates.

        What passes beside hidden states is known by running the model only, and seldom wider: it
        counts for as much, each.
        """
        return self.width * (1 + len(self.shared) + max(len(names) for names in self.live))


@contextlib.contextmanager
def stand_ins(layers: Sequence[nn.Module], forward: StandIn) -> Iterator[None]:
    """While open, a model's forward calls `forward(index, hidden, call)` for each layer.

    May be opened again while it is open: the inner one counts.
    """

    def stand_in(index: int) -> Callable:
        def call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(index, hidden_states, LayerCall(args, kwargs))

        return call

    before = [layer.__dict__.get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = stand_in(index)  # an instance attribute: shadows the class's method
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            if earlier is None:
                del layer.forward
            else:
                layer.forward = earlier


class _Indexed(Exception):
    """A model took what a layer returned for a tuple."""


class _Unpacked(Exception):
    """A model unpacked what a layer returned."""


class _Arrived(Exception):
    """A model called its second layer."""


class _Probe:
    """Stands for what a layer returns, to see what a model does with it."""

    def __getitem__(self, index: Any) -> Any:
        raise _Indexed

    def __iter__(self) -> Any:
        raise _Unpacked


def trace_wiring(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Wiring:
    """Finds out how a model uses what its layers return; its weights need not be there.

    Raises:
        UserError: It does not call each of its layers once, in order, or cannot be followed.
    """
    with hollow(model, layers), torch.enable_grad():
        elements = _elements(model, layers)
        marks = _Marks(model, layers, elements)
        with stand_ins(layers, marks.stand_in):
            try:
                logits = _run(model)
            except UserError:
                raise
            except Exception as error:  # the model's own code, on what it does not expect
                raise UserError(
                    f"{type(model).__name__}: its forward cannot be followed with its layers "
                    f"replaced ({type(error).__name__}: {brief(error)}); not supported"
                ) from error
        if len(marks.used) != len(layers):
            raise UserError(
                f"{type(model).__name__}: calls only {len(marks.used)} of its {len(layers)} "
                "layers; not supported"
            )
        marks.used.append(marks.sources(logits))
    return Wiring(elements, marks.live(), marks.shared(), marks.computed, marks.width)


class _Marks:
    """Stand-ins whose results are recognised wherever they turn up."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], elements: int) -> None:
        self.model, self.layers, self.elements = model, layers, elements
        self.used: list[set[str]] = []  # by layer, then of the logits: names
        self.names: dict[int, str] = {}  # by the id of a tensor that a stand-in returned
        self.kept: list[Any] = []  # keeps those ids from being given anew
        self.mappings: dict[str, list[int]] = {}  # argument → id of the mapping in each call
        self.computed = False
        self.width = 0

    def stand_in(self, index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
        """Notes what a layer is passed, and returns new marked tensors."""
        if index != len(self.used):
            name, due = type(self.model).__name__, len(self.used)
            what = (
                f"calls layer {index} again after layer {due - 1} (a loop over its layers)"
                if index < due
                else f"calls layer {index} before layer {due}"
            )
            raise UserError(f"{name}: {what}; it cannot be streamed layer by layer; not supported")
        arguments = self.sources((call.args, call.kwargs))
        self.used.append(arguments | self.sources(hidden))
        self.computed = self.computed or bool(arguments)
        self.width = max(self.width, hidden[:1, :1].numel() * hidden.element_size())
        for name, value in call.kwargs.items():
            # An empty one that several layers are given can only be there to be written into.
            if isinstance(value, MutableMapping) and not value:
                self.mappings.setdefault(name, []).append(id(value))
                self.kept.append(value)
        leaves = [torch.zeros_like(hidden).requires_grad_()]
        leaves += [torch.zeros(1, requires_grad=True) for _ in range(1, self.elements)]
        returned = [leaf.clone() for leaf in leaves]  # a leaf could not be changed in place
        for element, pair in enumerate(zip(leaves, returned, strict=True)):
            self.names |= {id(tensor): f"{index}.{element}" for tensor in pair}
            self.kept += pair
        return tuple(returned) if self.elements else returned[0]

    def sources(self, value: Any) -> set[str]:
        """The names of all that the tensors in `value` are or were computed from."""
        found: set[str] = set()
        seen: set[Any] = set()
        for tensor in tensors_in(value):
            if id(tensor) in self.names:
                found.add(self.names[id(tensor)])
            nodes = [tensor.grad_fn]
            while nodes:
                node = nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                leaf = getattr(node, "variable", None)
                if leaf is not None and id(leaf) in self.names:
                    found.add(self.names[id(leaf)])
                nodes += [entry for entry, _ in node.next_functions]
        return found

    def live(self) -> tuple[frozenset[str], ...]:
        """Per boundary, what passes it because something after it uses it."""
        found = []
        for boundary in range(len(self.layers) + 1):
            later = set().union(*self.used[boundary:])
            before = {name for name in later if int(name.partition(".")[0]) < boundary}
            found.append(frozenset(before - {f"{boundary - 1}.0"}))
        return tuple(found)

    def shared(self) -> frozenset[str]:
        """The arguments that are one mapping for several layers."""
        return frozenset(
            name for name, ids in self.mappings.items() if len(set(ids)) < max(2, len(ids))
        )


def _run(model: PreTrainedModel) -> torch.Tensor:
    """The model's forward over two tokens."""
    weight = model.get_input_embeddings().weight
    device = weight.device
    ids = torch.ones(1, 2, dtype=torch.int64, device=device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _elements(model: PreTrainedModel, layers: Sequence[nn.Module]) -> int:
    """How many elements the model takes out of what a layer returns; see `Wiring`."""

    def returning(value: Any) -> StandIn:
        def answer(index: int, hidden: torch.Tensor, call: LayerCall) -> Any:
            if index:
                raise _Arrived
            return value

        return answer

    with stand_ins(layers, returning(_Probe())):
        try:
            _run(model)
        except _Indexed:
            return 1
        except _Unpacked:
            pass
        except Exception:  # a lone layer's probe goes on to the norm, which cannot take it
            return 0
        else:
            return 0
    for count in range(1, MOST_ELEMENTS + 1):
        with stand_ins(layers, returning((_Probe(),) * count)):
            try:
                _run(model)
            except ValueError:  # not enough to unpack
                continue
            except Exception:  # it got further
                return count
    raise UserError(
        f"{type(model).__name__}: unpacks more than {MOST_ELEMENTS} elements of what a layer "
        "returns; not supported"
    )


@contextlib.contextmanager
def hollow(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """While open, tensors outside the layers that are not loaded are zeros without memory.

    The head gives one number a token: nobody looks at logits here.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    replaced: list[tuple[dict, str, Any]] = []
    for module in model.modules():
        if id(module) in inside:
            continue
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_meta:
                    replaced.append((store, name, tensor))
                    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                    is_weight = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(zeros, requires_grad=False) if is_weight else zeros
    head = model.get_output_embeddings()
    own = None if head is None else head.__dict__.get("forward")
    if head is not None:
        head.forward = lambda hidden: hidden[..., :1]
    try:
        yield
    finally:
        if head is not None:
            del head.forward
            if own is not None:
                head.forward = own
        for store, name, tensor in replaced:
            store[name] = tensor
