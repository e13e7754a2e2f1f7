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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def pack(
    term: Term,
    bits: int,
    group: int | None = 64,
    symmetric: bool = True,
    tensors: Iterable[str] | None = None,
) -> Term:
    """Returns the term with weights stored in few bits, rounded to nearest.

    Args:
        term: Of any kind; what is packed already is packed anew. On the meta device shapes come out
            right.
        bits: Bits of a weight: 2, 3, 4 or 8.
        group: How many neighbours in a row share a scale; None: all of the row.
        symmetric: Without zero points: the group's largest weight in size gets the code 0, which
            stands for ``-2^(bits - 1)`` scales (a scale may be negative), and what lies opposite is
            cut off at ``2^(bits - 1) - 1`` of them. Otherwise levels are spread from the least to
            the largest weight (and 0), and the one that stands for 0 is stored.
        tensors: Which of the term's floating tensors; by default all but those that the kind names
            in `Term.plain`.

    Raises:
        ValueError: Bits or group are impossible, a tensor is unknown or holds NaN or infinity.
    """
    held = term.tensors()
    floating = [name for name, tensor in held.items() if tensor.is_floating_point()]
    names = [name for name in floating if name not in term.plain] if tensors is None else tensors
    packed: dict[str, Tensor] = {}
    for name in names:
        if name not in floating:
            raise ValueError(f"tensors: a {term.kind} term has no weights '{name}'")
        try:
            packed[name] = quantise(held[name], bits, group, symmetric)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return term.with_tensors({**held, **packed})


def packed_bits(term: Term) -> list[int]:
    """Returns the bits in which packed weights of a term are stored, each once, most first."""
    packed = (t for t in term.tensors().values() if isinstance(t, PackedTensor))
    return sorted({tensor.bits for tensor in packed}, reverse=True)


def quantise(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> PackedTensor:
    """Rounds a tensor ``[..., n]`` to nearest in groups along its last dimension; see `pack`.

    0 is a level of every group. A group of zeros gets the scale 0.
    """
    if bits not in BITS:
        raise ValueError(f"bits: must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise ValueError(f"group: must be a positive integer, not {group!r}")
    if not weight.is_floating_point() or weight.dim() < 1:
        raise ValueError(f"is {dtype_name(weight.dtype)}, not floating point")
    if isinstance(weight, PackedTensor):
        weight = weight.unpack()
    n = weight.shape[-1]
    width = max(1, n if group is None else min(group, n))
    if weight.dim() == 1 or weight.shape[0] == 0 or weight.is_meta:
        codes, scales, zeros = _rounded(weight, bits, width, symmetric)
    else:
        # Slot by slot: what rounding needs beside the result is a few times one slot.
        parts = [_rounded(part, bits, width, symmetric) for part in weight]
        codes, scales, zeros = (torch.stack(part) for part in zip(*parts, strict=True))
    return PackedTensor(
        pack_bits(codes, bits),
        scales.to(weight.dtype),
        None if symmetric else pack_bits(zeros, bits),
        bits=bits,
        group=width,
        shape=weight.shape,
    )


def _rounded(
    weight: Tensor, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[..., n]``, scales and zero points ``[..., G]`` of a tensor ``[..., n]``."""
    n = weight.shape[-1]
    groups = -(-n // group)
    if weight.is_meta:  # plans lay out terms of every size; rounding nothing takes its time too
        scales = weight.new_empty((*weight.shape[:-1], groups))
        return weight.to(torch.uint8), scales, scales.to(torch.uint8)
    values = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(values.isfinite().all()):
        raise ValueError("holds NaN or infinity")
    # Filled up with zeros: they lie in every range.
    values = torch.nn.functional.pad(values, (0, groups * group - n))
    values = values.unflatten(-1, (groups, group))
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales = torch.where(high > -low, high, low) / -middle
    else:
        scales = high / levels - low / levels
    # A scale that bfloat16 can hold, and the storage dtype as well.
    most = torch.finfo(weight.dtype).max
    scales = scales.to(torch.bfloat16).to(values.dtype).clamp(-most, most)
    steps = torch.where(scales != 0, scales, torch.ones_like(scales))
    zeros = torch.full_like(low, middle) if symmetric else (-low / steps).round().clamp(0, levels)
    codes = (values / steps[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, levels).flatten(-2)[..., :n]
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


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


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers ``[..., n]`` below ``2^bits`` into uint8 ``[..., ⌈n · bits / 8⌉]``.

    Bits are 1 (a mask), 2, 3, 4 or 8.

    Value i of a row occupies bits ``i·bits .. (i+1)·bits - 1`` of the row, where bit j is bit
    ``j mod 8``, of value ``2^(j mod 8)``, of byte ``⌊j / 8⌋``. What is left of the last byte is 0.
    """
    n = values.shape[-1]
    if bits == 8:
        return values.to(torch.uint8)
    if values.is_meta:  # plans lay out hundreds of sizes
        shape = (*values.shape[:-1], packed_width(n, bits))
        return torch.empty(shape, dtype=torch.uint8, device="meta")
    unit = 8 if bits == 3 else 8 // bits
    filled = torch.nn.functional.pad(values.to(torch.int32), (0, -n % unit))
    filled = filled.unflatten(-1, (filled.shape[-1] // unit, unit))
    word = filled[..., 0]
    for i in range(1, unit):
        word = word | (filled[..., i] << (bits * i))
    used = bits * unit // 8
    pieces = [(word >> (8 * byte)) & 255 for byte in range(used)]
    packed = torch.stack(pieces, dim=-1).flatten(-2).to(torch.uint8)
    return packed[..., : packed_width(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 ``[..., n]``."""
    if bits == 8:
        return packed
    if bits == 3:
        filled = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3))
        a, b, c = filled.unflatten(-1, (filled.shape[-1] // 3, 3)).unbind(-1)
        pieces = [
            a,
            a >> 3,
            (a >> 6) | (b << 2),
            b >> 1,
            b >> 4,
            (b >> 7) | (c << 1),
            c >> 2,
            c >> 5,
        ]
        pieces = [piece & 7 for piece in pieces]
    else:
        pieces = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(pieces, dim=-1).flatten(-2)[..., :n]


def packed_width(n: int, bits: int) -> int:
    """How many bytes n values of a row take."""
    return -(-n * bits // 8)


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
