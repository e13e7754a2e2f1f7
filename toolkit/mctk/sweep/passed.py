"""What passes from one decoder layer to the next.

Hidden states, and in most families nothing else. Some pass more: a layer returns something that the
next one is given (a router's states, the positions that a sparse attention chose), the model itself
puts the outputs of earlier layers together for later ones, or layers write into a mapping that all
of them are given (shared keys and values). `wiring` finds out which; here it has names:

- ``3.1``: the second element of what layer 3 returned; ``3.0``: its hidden states, where a layer
  after the next one still needs them;
- ``3.shared.key.0``: the first tensor that layer 3 wrote under "key" into the argument `shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UserError


@dataclass(frozen=True)
class LayerCall:
    """What the model passed to one layer beside the hidden states.

    Attributes:
        args: By position.
        kwargs: By name.
        ids: Token ids [B, T], of a family whose layers are passed what others gave: arguments are
            then found by running the model's own forward again (`StreamedModel.arrive`), and those
            above are empty. Else None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: torch.Tensor | None = None

    def without(self, names: Iterable[str]) -> LayerCall:
        """The same without the named arguments."""
        left = {name: value for name, value in self.kwargs.items() if name not in names}
        return LayerCall(self.args, left, self.ids)


@dataclass(frozen=True)
class Passed:
    """What passes between two layers, of one batch.

    Attributes:
        hidden: Hidden states [B, T, H]; [B, T, n, H] where a family has n streams of them.
        more: What passes beside them, by name (see the module); B is the first dimension of all.
    """

    hidden: torch.Tensor
    more: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.hidden)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Passed:
        """The same with a function applied to every tensor."""
        return Passed(function(self.hidden), {k: function(t) for k, t in self.more.items()})

    def to(self, device: torch.device | str) -> Passed:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def cpu(self) -> Passed:
        """The same on the CPU."""
        return self.to("cpu")

    def split(self, sizes: Sequence[int]) -> list[Passed]:
        """The same in batches of these sizes."""
        parts = {name: tensor.split(list(sizes)) for name, tensor in self.more.items()}
        return [
            Passed(hidden, {name: part[i] for name, part in parts.items()})
            for i, hidden in enumerate(self.hidden.split(list(sizes)))
        ]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Named tensors for a file: the hidden states under `name`."""
        return {name: self.hidden, **{f"{name}/{key}": t for key, t in self.more.items()}}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], name: str) -> Passed:
        """The inverse of `tensors`; other names are passed over."""
        more = {
            key.removeprefix(f"{name}/"): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}/")
        }
        return cls(tensors[name], more)

    @classmethod
    def cat(cls, parts: Sequence[Passed]) -> Passed:
        """Batches as one."""
        names = parts[0].more
        more = {name: torch.cat([part.more[name] for part in parts]) for name in names}
        return cls(torch.cat([part.hidden for part in parts]), more)


def batch_name(number: int) -> str:
    """The name of a batch's hidden states in files."""
    return f"batch.{number}"


def batch_tensors(batches: Sequence[Passed]) -> dict[str, torch.Tensor]:
    """Named tensors of many batches for one file."""
    found: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        found |= batch.tensors(batch_name(number))
    return found


def read_batch(file: Any, number: int) -> Passed:
    """Reads one batch from an open file of `batch_tensors`, and nothing else."""
    name = batch_name(number)
    wanted = [key for key in file.keys() if key.partition("/")[0] == name]  # noqa: SIM118
    return Passed.of({key: file.get_tensor(key) for key in wanted}, name)


def count_batches(file: Any) -> int:
    """How many batches an open file of `batch_tensors` holds."""
    return len({key.partition("/")[0] for key in file.keys() if key.startswith("batch.")})  # noqa: SIM118


def same(a: Any, b: Any) -> bool:
    """Whether two recorded arguments are equal, tensors by value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, tuple | list) and type(a) is type(b):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    try:
        return bool(a is b or a == b)
    except (RuntimeError, ValueError):  # objects that compare to something without a truth value
        return False


def same_call(a: LayerCall, b: LayerCall) -> bool:
    """Whether two layers are passed the same beside hidden states."""
    return same(a.args, b.args) and same(a.kwargs, b.kwargs)


def share_calls(calls: list[LayerCall], earlier: list[LayerCall] | None) -> list[LayerCall]:
    """Keeps the tensors of an earlier batch's calls where a new batch's are equal to them.

    Within one batch, too, layers are mostly passed the same objects; those stay shared.
    """
    if earlier is None:
        return calls
    return [
        LayerCall(_share(new.args, old.args), _share(new.kwargs, old.kwargs), new.ids)
        for new, old in zip(calls, earlier, strict=True)
    ]


def _share(new: Any, old: Any) -> Any:
    """Replaces tensors of `new` that equal those at the same place in `old` by the old ones.

    Batches of one shape have the same masks and positions; kept once, they cost nothing.
    """
    if isinstance(new, torch.Tensor):
        return old if isinstance(old, torch.Tensor) and same(new, old) else new
    if isinstance(new, tuple | list) and isinstance(old, tuple | list) and len(new) == len(old):
        parts = [_share(a, b) for a, b in zip(new, old, strict=True)]
        return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    return new


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in recorded arguments, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)


def read_mapping(more: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """What a layer wrote into a mapping that layers share: key → tensor or tuple of tensors.

    Args:
        more: What passes a boundary after the layer, by name.
        prefix: The layer's number and the argument's name, each with a dot.
    """
    found: dict[str, Any] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in more.items():
        if not name.startswith(prefix):
            continue
        key, _, part = name.removeprefix(prefix).partition(".")
        if part:
            parts.setdefault(key, {})[int(part)] = tensor
        else:
            found[key] = tensor
    return found | {key: tuple(part[i] for i in sorted(part)) for key, part in parts.items()}


def mapping_after(
    mapping: Mapping[Any, Any], earlier: Mapping[str, torch.Tensor], prefix: str, layer: str
) -> dict[str, torch.Tensor]:
    """All that a shared mapping holds after a layer has run, by name.

    Args:
        mapping: It.
        earlier: What layers before wrote, by name: the very tensors that the mapping held.
        prefix: The layer's number and the argument's name, each with a dot.
        layer: The layer in words, for errors.

    Raises:
        UserError: The layer has written what is not tensors under a string.
    """
    names = {(id(tensor), name.split(".", 2)[2]): name for name, tensor in earlier.items()}
    found: dict[str, torch.Tensor] = {}
    for key, value in mapping.items():
        parts = value if isinstance(value, tuple) else (value,)
        known = isinstance(key, str) and "." not in key
        if not known or not all(isinstance(part, torch.Tensor) for part in parts):
            raise UserError(
                f"{layer}: writes {describe(value)} under {key!r} for other layers to see; only "
                "tensors can be carried on"
            )
        for number, part in enumerate(parts):
            place = f"{key}.{number}" if isinstance(value, tuple) else key
            found[names.get((id(part), place), prefix + place)] = part
    return found


def describe(value: Any) -> str:
    """A returned value in words, for errors."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
