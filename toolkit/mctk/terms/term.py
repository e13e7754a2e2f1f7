"""The base class of terms: spec, accounting, conversion."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mctk.errors import CheckpointError
from mctk.terms.indices import SlotMap, dtype_name
from mctk.terms.packing import PackedTensor, from_parts, packing_of, part_name
from mctk.terms.registry import OURS, kind, provider_of
from mctk.terms.shape import BankShape

_HEADER = ("kind", "provider", "members", "out", "in", "packing", "tensors")


class Term(ABC):
    """One affine contribution to a bank.

    A subclass sets `kind`, keeps its tensors as attributes that bear the names `tensors` gives
    them, checks everything in its constructor (ValueError that begins with the key) and is
    registered with `register_kind`. All weights of a term have one dtype; an input must have it
    too.

    Any weight may be stored packed in few bits (`mctk.terms.pack`): `tensors` then gives a
    `PackedTensor`, which reads like the plain one, and `stored` its parts.

    Attributes:
        kind: Name of the kind, unique among all plugins.
        plain: Floating tensors that `pack` leaves alone unless they are named.
        shape: The bank's shape.
        rows: Output rows that the term touches, ``[R]`` or per slot ``[S, R]``; None: all.
        cols: Input columns that the term touches, ``[C]`` or per slot ``[S, C]``; None: all.
    """

    kind: ClassVar[str]
    plain: ClassVar[tuple[str, ...]] = ()
    shape: BankShape
    rows: Tensor | None = None
    cols: Tensor | None = None

    # What a kind defines.

    @property
    @abstractmethod
    def slots(self) -> SlotMap:
        """The stored slot of each member, None where the term is absent."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The term's tensors by name; weights are floating, positions are integers."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a spec says beside shape and tensors, in JSON types: slot maps, storage."""

    @classmethod
    @abstractmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Term:
        """Constructs the term from what `settings` and `tensors` gave.

        Raises:
            KeyError: A setting or tensor is missing.
            ValueError: Something does not fit; the message begins with its key.
        """

    @abstractmethod
    def macs(self, member: int) -> int:
        """Multiply-adds that one token costs in a member; 0 where the term is absent."""

    @abstractmethod
    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """The term as (weight ``[out, in]`` or None, bias ``[out]`` or None)."""

    @abstractmethod
    def apply(self, x: Tensor, member: int) -> Tensor:
        """Returns the term's output ``[T, out]`` for inputs ``x [T, in]`` of its own dtype."""

    # What follows from it; a kind with more than one slot map, or tensors that all slots share,
    # overrides the first two.

    def slot_maps(self) -> dict[str, SlotMap]:
        """The slot maps by their keys in `settings`."""
        return {"slots": self.slots}

    def slot_map_of(self, name: str) -> str | None:
        """The key of the slot map by which a stored tensor's first dimension goes.

        Args:
            name: One of `tensors`.

        Returns:
            None for a tensor that all slots share.
        """
        shared = name in ("rows", "cols") and self.tensors()[name].dim() == 1
        return None if shared else "slots"

    def has(self, member: int) -> bool:
        """Whether the term contributes to a member."""
        return self.slots[member] is not None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(t.dtype for t in self.tensors().values() if t.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(self.tensors().values())).device

    def parameters(self) -> int:
        """Stored weight elements; positions are not parameters."""
        return sum(t.numel() for t in self.tensors().values() if t.is_floating_point())

    def nbytes(self) -> int:
        """Stored bytes: positions, scales and zero points included."""
        return sum(t.numel() * t.element_size() for t in self.stored().values())

    def stored(self) -> dict[str, Tensor]:
        """The tensors as files hold them: of a packed one its parts, ``weight_codes`` and so on."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.tensors().items():
            if isinstance(tensor, PackedTensor):
                found |= {part_name(name, part): t for part, t in tensor.parts().items()}
            else:
                found[name] = tensor
        return found

    def with_stored(self, stored: Mapping[str, Tensor]) -> Term:
        """Returns the same term around other tensors as `stored` gives them, unchecked."""
        tensors = {}
        for name, tensor in self.tensors().items():
            if isinstance(tensor, PackedTensor):
                parts = {part: stored[part_name(name, part)] for part in tensor.parts()}
                tensors[name] = tensor.with_parts(parts)
            else:
                tensors[name] = stored[name]
        return self.with_tensors(tensors)

    def unpacked(self) -> Term:
        """Returns the term with all weights plain; itself if nothing is packed."""
        held = self.tensors()
        if not any(isinstance(t, PackedTensor) for t in held.values()):
            return self
        return self.with_tensors(
            {n: t.unpack() if isinstance(t, PackedTensor) else t for n, t in held.items()}
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Term:
        """Returns the same term around other tensors of the same shapes, unchecked.

        For moving, casting and for modules that own a term's tensors. Data whose values were
        never checked goes through `from_spec`.
        """
        changed = copy.copy(self)
        for name in self.tensors():
            setattr(changed, name, tensors[name])
        return changed

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Term:
        """Returns the term in another dtype (weights only) and on another device.

        Of packed weights the scales are cast; the codes stay.
        """
        return self.with_tensors(
            {
                name: t.moved(dtype, device)
                if isinstance(t, PackedTensor)
                else t.to(device=device, dtype=dtype if t.is_floating_point() else None)
                for name, t in self.tensors().items()
            }
        )

    def spec(self) -> dict[str, Any]:
        """Returns all of the term but its data, in JSON types."""
        provider = provider_of(self.kind)
        packing = {
            name: t.describe() for name, t in self.tensors().items() if isinstance(t, PackedTensor)
        }
        return {
            "kind": self.kind,
            **({} if provider == OURS else {"provider": provider}),
            "members": self.shape.members,
            "out": self.shape.out_features,
            "in": self.shape.in_features,
            **self.settings(),
            **({"packing": packing} if packing else {}),
            "tensors": {
                name: {"shape": list(t.shape), "dtype": dtype_name(t.dtype)}
                for name, t in self.stored().items()
            },
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Term:
        """Constructs a term from its spec; ``Term.from_spec`` finds the class by the kind.

        Args:
            spec: What `spec` gave.
            tensors: What `stored` gave.

        Shapes, slots and index values are checked (values not on the meta device). A weight may
        have another floating dtype than the spec says: that is how a model is loaded in another
        dtype than it was stored in.

        Raises:
            CheckpointError: The spec and the tensors do not fit; the message names the key.
        """
        name = spec.get("kind")
        if not isinstance(name, str):
            raise CheckpointError(f"kind: must be the name of a term kind, not {name!r}")
        found = kind(name, spec.get("provider"))
        if not issubclass(found, cls):
            raise CheckpointError(f"kind: is '{name}', expected '{cls.kind}'")
        try:
            return _build(found, spec, tensors)
        except KeyError as error:
            raise CheckpointError(f"{name} term: {error.args[0]}: is missing") from error
        except ValueError as error:
            raise CheckpointError(f"{name} term: {error}") from error

    def _check_input(self, x: Tensor) -> None:
        """Checks that an input is ``[T, in]`` and has the dtype of the weights."""
        if x.dim() != 2 or x.shape[1] != self.shape.in_features:
            raise ValueError(
                f"input has shape {list(x.shape)}, expected [T, {self.shape.in_features}]"
            )
        if x.dtype != self.dtype:
            raise TypeError(
                f"input is {dtype_name(x.dtype)}, the {self.kind} term is "
                f"{dtype_name(self.dtype)}: cast one of them"
            )

    def _no_output(self, x: Tensor) -> Tensor:
        """Returns the output ``[T, out]`` of a member without the term: zeros."""
        return x.new_zeros(x.shape[0], self.shape.out_features)


def _build(cls: type[Term], spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Term:
    for key in ("members", "out", "in"):
        value = spec[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: must be a positive integer, not {value!r}")
    shape = BankShape(spec["members"], spec["out"], spec["in"])
    _check_tensors(_tensor_specs(spec), tensors)
    settings = {key: value for key, value in spec.items() if key not in _HEADER}
    tensors = _joined(spec, tensors)
    term = cls.build(shape, settings, tensors)
    # A spec is exactly what the term would say of itself: this finds unknown keys, and settings
    # that contradict the tensors.
    own = term.settings()
    for key, value in settings.items():
        if key not in own:
            raise ValueError(f"{key}: unknown key")
        if own[key] != value:
            raise ValueError(f"{key}: is {value!r}, the tensors say {own[key]!r}")
    for key in tensors:
        if key not in term.tensors():
            raise ValueError(f"tensors.{key}: unknown tensor")
    return term


def _joined(spec: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A term's tensors from the stored ones: parts of packed tensors put together."""
    found = dict(stored)
    for name in packing_of(spec):
        if name in stored:
            raise ValueError(f"tensors.{name}: is stored both plain and packed")
        packed = from_parts(name, spec["packing"][name], stored)
        for part in packed.parts():
            del found[part_name(name, part)]
        found[name] = packed
    return found


def _check_tensors(specs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name in specs:
        if name not in tensors:
            raise ValueError(f"tensors.{name}: the data is missing")
    for name, tensor in tensors.items():
        if name not in specs:
            raise ValueError(f"tensors.{name}: is not in the spec")
        shape, dtype = _tensor_spec(name, specs[name])
        if shape != tuple(tensor.shape):
            raise ValueError(
                f"tensors.{name}: has shape {list(tensor.shape)}, the spec says {list(shape)}"
            )
        castable = dtype.is_floating_point and tensor.is_floating_point()
        if tensor.dtype != dtype and not castable:
            raise ValueError(
                f"tensors.{name}: is {dtype_name(tensor.dtype)}, the spec says {dtype_name(dtype)}"
            )


def _tensor_specs(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    specs = spec["tensors"]
    if not isinstance(specs, Mapping):
        raise ValueError(f"tensors: must map names to shape and dtype, not {specs!r}")
    return specs


def _tensor_spec(name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype]:
    if not isinstance(entry, Mapping) or set(entry) != {"shape", "dtype"}:
        raise ValueError(f"tensors.{name}: must have 'shape' and 'dtype', not {entry!r}")
    shape = entry["shape"]
    sizes_are_good = isinstance(shape, (list, tuple)) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape
    )
    if not sizes_are_good:
        raise ValueError(f"tensors.{name}.shape: must be a list of sizes, not {shape!r}")
    dtype = getattr(torch, str(entry["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"tensors.{name}.dtype: unknown dtype {entry['dtype']!r}")
    return tuple(shape), dtype


def spec_parameters(spec: Mapping[str, Any]) -> int:
    """Returns what `Term.parameters` would count for a spec, of any kind."""
    return sum(spec_elements(spec).values())


def spec_elements(spec: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many weights each stored tensor of a spec holds, of any kind.

    Codes stand for the weights that they pack; scales, zero points and positions are none.
    """
    packing = packing_of(spec)
    found = {}
    for name, entry in _tensor_specs(spec).items():
        shape, dtype = _tensor_spec(name, entry)
        found[name] = math.prod(shape) if dtype.is_floating_point else 0
    for name, shape in packing.items():
        found[part_name(name, "codes")] = math.prod(shape)
        found[part_name(name, "scales")] = 0
    return found


def spec_bytes(spec: Mapping[str, Any]) -> int:
    """Returns what `Term.nbytes` would count for a spec, of any kind."""
    entries = [_tensor_spec(name, entry) for name, entry in _tensor_specs(spec).items()]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in entries)
