"""Weights stored in fewer bits: groups of small integers with a scale, packed bit by bit.

Packing is a property of how a term's tensor is stored, not a kind of term: `pack` returns the same
term, with some of its tensors as `PackedTensor`. Round to nearest, in groups along the last (input)
dimension; group g of a row is

    w ≈ scale_g · (code - zero_g),  codes and zero points integers of 2, 3, 4 or 8 bits.

A packed tensor reads like the plain one with the values that the codes stand for. Its dtype is
that of its scales, which are chosen among the numbers that bfloat16 can hold and the codes fitted
to those: casting a term from float32 to bfloat16 then changes no code and no scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mctk.terms.bits import packed_width, unpack_bits
from mctk.terms.indices import check_float, dtype_name

if TYPE_CHECKING:
    from mctk.terms.term import Term

BITS = (2, 3, 4, 8)
PARTS = ("codes", "scales", "zeros")
_KEYS = {"bits", "group", "shape"}


class PackedTensor(Tensor):
    """A tensor of small integers and scales that behaves as the floats they stand for.

    Whatever torch does with it is done with its values, multiplied out for that call alone, except
    that reading one slot, ``packed[s]``, multiplies out that slot only, and that moving it, or
    picking slots by `index_select`, leaves it packed. It is never changed in place.

    Args:
        codes: uint8 ``[..., ⌈n · bits / 8⌉]``, each row a string of bits, lowest first.
        scales: ``[..., G]``, one a group; the last group of a row may be shorter.
        zeros: uint8 ``[..., ⌈G · bits / 8⌉]``, the codes that stand for 0, packed likewise; None:
            ``2^(bits - 1)`` in all groups (symmetric).
        bits: Bits of a code: 2, 3, 4 or 8.
        group: Elements of a group.
        shape: ``[..., n]``, that of the plain tensor.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int

    @staticmethod
    def __new__(
        cls: type[PackedTensor],
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        bits: int,
        group: int,
        shape: Sequence[int],
    ) -> PackedTensor:
        """See the class."""
        made = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=scales.dtype, device=codes.device
        )
        made.codes, made.scales, made.zeros = codes, scales, zeros
        made.bits, made.group = bits, group
        return made

    def parts(self) -> dict[str, Tensor]:
        """What is stored: codes, scales and, unless symmetric, zeros."""
        found = {"codes": self.codes, "scales": self.scales}
        return found if self.zeros is None else {**found, "zeros": self.zeros}

    def with_parts(self, parts: Mapping[str, Tensor]) -> PackedTensor:
        """The same layout around other parts."""
        return PackedTensor(
            parts["codes"],
            parts["scales"],
            parts.get("zeros"),
            bits=self.bits,
            group=self.group,
            shape=self.shape,
        )

    def moved(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PackedTensor:
        """The same codes with scales in another dtype, on another device."""
        return self.with_parts(
            {
                name: t.to(device=device, dtype=dtype if name == "scales" else None)
                for name, t in self.parts().items()
            }
        )

    def describe(self) -> dict[str, Any]:
        """What a spec says of it beside its parts."""
        return {"bits": self.bits, "group": self.group, "shape": list(self.shape)}

    def unpack(self) -> Tensor:
        """Returns the plain tensor, in the dtype of the scales."""
        return _values(self.codes, self.scales, self.zeros, self.bits, self.group, self.shape)

    def slots(self, chosen: Tensor) -> PackedTensor:
        """Returns some slots (of the first dimension), packed as they are."""
        return PackedTensor(
            self.codes.index_select(0, chosen),
            self.scales.index_select(0, chosen),
            None if self.zeros is None else self.zeros.index_select(0, chosen),
            bits=self.bits,
            group=self.group,
            shape=(chosen.numel(), *self.shape[1:]),
        )

    def _slot(self, slot: int) -> Tensor:
        """One slot's values."""
        zeros = None if self.zeros is None else self.zeros[slot]
        return _values(
            self.codes[slot], self.scales[slot], zeros, self.bits, self.group, self.shape[1:]
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        """Copies the parts."""
        return self.with_parts(copy.deepcopy(self.parts(), memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the parts."""
        return _restore, (self.codes, self.scales, self.zeros, self.describe())

    def __repr__(self) -> str:  # type: ignore[override]
        """Says how it is packed; values would have to be multiplied out."""
        return (
            f"PackedTensor({list(self.shape)}, {dtype_name(self.dtype)}, {self.bits} bits, "
            f"groups of {self.group})"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answers what needs no values; everything else gets the values."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], PackedTensor):
            handled = _HANDLED.get(func)
            found = None if handled is None else handled(*args, **kwargs)
            if found is not None:
                return found
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The same for what reaches torch's core without the way over `__torch_function__`."""
        return func(*_plain(args), **_plain(kwargs or {}))


def _restore(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, described: Mapping[str, Any]
) -> PackedTensor:
    return PackedTensor(codes, scales, zeros, **described)


_METADATA = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.is_meta.__get__,
    Tensor.ndim.__get__,
    Tensor.itemsize.__get__,
    Tensor.requires_grad.__get__,
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    torch.is_floating_point,
    torch.numel,
}


def _item(packed: PackedTensor, index: Any) -> Tensor | None:
    single = isinstance(index, int) and not isinstance(index, bool)
    return packed._slot(index) if single else None


def _select(packed: PackedTensor, dim: int, index: Tensor) -> Tensor | None:
    return packed.slots(index) if dim == 0 else None


def _to(packed: PackedTensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Moves it where no other dtype is asked for: another dtype rounds values, not scales."""
    if kwargs.keys() - {"device", "dtype"} or len(args) > 1:
        return None
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if args:
        if isinstance(args[0], torch.dtype):
            dtype = args[0]
        elif isinstance(args[0], torch.device | str | int):
            device = args[0]
        else:
            return None
    return packed.moved(device=device) if dtype in (None, packed.dtype) else None


def _same(packed: PackedTensor) -> Tensor:
    return packed


_HANDLED: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.index_select: _select,
    torch.index_select: _select,
    Tensor.to: _to,
    Tensor.cpu: lambda packed: packed.moved(device="cpu"),
    Tensor.detach: _same,
    torch.detach: _same,
}


def _plain(value: Any) -> Any:
    """Arguments with packed tensors multiplied out."""
    if isinstance(value, PackedTensor):
        return value.unpack()
    if isinstance(value, tuple | list):
        # Also torch.Size and what else is a tuple: only those that hold packed tensors matter.
        if not any(isinstance(v, PackedTensor | tuple | list | dict) for v in value):
            return value
        return type(value)(_plain(v) for v in value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def packed_bits(term: Term) -> list[int]:
    """Returns the bits in which packed weights of a term are stored, each once, most first."""
    packed = (t for t in term.tensors().values() if isinstance(t, PackedTensor))
    return sorted({tensor.bits for tensor in packed}, reverse=True)


def _values(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    shape: Sequence[int],
) -> Tensor:
    """The floats that codes stand for; differences of codes are exact in every floating dtype."""
    n, groups = shape[-1], scales.shape[-1]
    values = unpack_bits(codes, bits, n).to(scales.dtype)
    if zeros is None:
        offsets = torch.full_like(scales, 2 ** (bits - 1))
    else:
        offsets = unpack_bits(zeros, bits, groups).to(scales.dtype)
    if n == groups * group:
        values = values.unflatten(-1, (groups, group))
        return values.sub_(offsets[..., None]).mul_(scales[..., None]).flatten(-2)
    spread = offsets.repeat_interleave(group, -1)[..., :n]
    return values.sub_(spread).mul_(scales.repeat_interleave(group, -1)[..., :n])


def from_parts(name: str, described: Any, stored: Mapping[str, Tensor]) -> PackedTensor:
    """Builds a packed tensor from what a spec says and the stored tensors of a term.

    Args:
        name: The tensor's name in the term.
        described: Its entry under ``packing``.
        stored: The term's stored tensors; its own are called as `part_name` says.

    Raises:
        ValueError: Something does not fit; the message begins with the key.
    """
    key = f"packing.{name}"
    shape, bits, group = _described(key, described)
    n, outer = shape[-1], shape[:-1]
    groups = -(-n // group)
    parts = {}
    for part in PARTS:
        full = part_name(name, part)
        if full in stored:
            parts[part] = stored[full]
        elif part != "zeros":
            raise ValueError(f"tensors.{full}: the data is missing")
    check_float(part_name(name, "scales"), parts["scales"], (*outer, groups))
    for part, count in (("codes", n), ("zeros", groups)):
        if part not in parts:
            continue
        full, found = part_name(name, part), parts[part]
        expected = [*outer, packed_width(count, bits)]
        if list(found.shape) != expected or found.dtype != torch.uint8:
            raise ValueError(
                f"{full}: is {dtype_name(found.dtype)} {list(found.shape)}, expected uint8 "
                f"{expected}"
            )
    return PackedTensor(
        parts["codes"], parts["scales"], parts.get("zeros"), bits=bits, group=group, shape=shape
    )


def part_name(name: str, part: str) -> str:
    """The name under which a part of a packed tensor is stored: ``weight_codes``."""
    return f"{name}_{part}"


def _described(key: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Shape, bits and group of an entry under ``packing``, checked."""
    if not isinstance(entry, Mapping) or set(entry) != _KEYS:
        raise ValueError(f"{key}: must have 'bits', 'group' and 'shape', not {entry!r}")
    shape, bits, group = entry["shape"], entry["bits"], entry["group"]
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"{key}.bits: must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"{key}.group: must be a positive integer, not {group!r}")
    good = isinstance(shape, list | tuple) and bool(shape) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )  # fmt: skip
    if not good:
        raise ValueError(f"{key}.shape: must be a list of sizes, not {shape!r}")
    return tuple(shape), bits, group


def packing_of(spec: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The packed tensors of a spec and their plain shapes.

    Raises:
        ValueError: An entry is malformed.
    """
    entries = spec.get("packing", {})
    if not isinstance(entries, Mapping):
        raise ValueError(f"packing: must map names to bits, group and shape, not {entries!r}")
    return {name: _described(f"packing.{name}", entry)[0] for name, entry in entries.items()}
