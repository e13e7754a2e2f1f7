"""Slot maps and index sets: checks, and the gathers and scatters that they stand for.

A *slot map* sends a member to the stored slot that serves it, or to None: sharing and absence.
An *index set* (``rows`` or ``cols``) names the output rows or input columns that a term touches,
``[n]`` for all slots or ``[S, n]`` per slot. Index tensors are stored as int32 where that is
enough and become int64 on use.

The checks raise ValueError with the key that is wrong; `Term.from_spec` turns it into an error
of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SlotMap = tuple[int | None, ...]


def check_slots(key: str, slots: Any, members: int, stored: int) -> SlotMap:
    """Returns the slot map as a tuple after checking its length and range.

    Args:
        key: Name in error messages.
        slots: For each member a slot below ``stored``, or None.
        members: Members of the bank.
        stored: Slots that the tensor has.
    """
    if not isinstance(slots, Sequence) or isinstance(slots, str):
        raise ValueError(f"{key}: must be a list with one entry per member, not {slots!r}")
    if len(slots) != members:
        raise ValueError(f"{key}: has {len(slots)} entries, the bank has {members} members")
    for member, slot in enumerate(slots):
        if slot is None:
            continue
        if isinstance(slot, bool) or not isinstance(slot, int):
            raise ValueError(f"{key}[{member}]: must be an integer or null, not {slot!r}")
        if not 0 <= slot < stored:
            raise ValueError(f"{key}[{member}]: slot {slot} is not one of the {stored} stored")
    return tuple(slots)


def check_float(key: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Checks that a tensor of weights has the expected shape and a floating type."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{key}: has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{key}: must be floating point, not {dtype_name(tensor.dtype)}")


def check_same_dtype(tensors: dict[str, Tensor]) -> None:
    """Checks that all weights of a term have one type: nothing is ever promoted silently."""
    floats = {key: t.dtype for key, t in tensors.items() if t.is_floating_point()}
    if len(set(floats.values())) > 1:
        listed = ", ".join(f"{key} {dtype_name(dtype)}" for key, dtype in floats.items())
        raise ValueError(f"weights of one term must have one dtype: {listed}")


def check_index(key: str, index: Tensor, stored: int, bound: int) -> int:
    """Checks an index set and returns how many indices it has per slot.

    Values (range, no repetition) are checked unless the tensor is on the meta device.

    Args:
        key: Name in error messages.
        index: ``[n]`` or ``[stored, n]``, int32 or int64.
        stored: Slots that the term has.
        bound: Indices must lie below it.
    """
    check_index_dtype(key, index)
    if index.dim() not in (1, 2) or (index.dim() == 2 and index.shape[0] != stored):
        raise ValueError(
            f"{key}: has shape {list(index.shape)}, expected [n] or [{stored}, n] (per slot)"
        )
    count = index.shape[-1]
    if count > bound:
        raise ValueError(f"{key}: has {count} indices, only {bound} exist")
    check_range(key, index, bound)
    if not index.is_meta and count > 1:
        ordered = index.sort(dim=-1).values
        if bool((ordered.diff(dim=-1) == 0).any()):
            raise ValueError(f"{key}: an index is repeated")
    return count


def check_index_dtype(key: str, index: Tensor) -> None:
    """Checks that an index tensor is int32 or int64."""
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{key}: must be int32 or int64, not {dtype_name(index.dtype)}")


def check_range(key: str, index: Tensor, bound: int) -> None:
    """Checks that all indices lie in ``0 .. bound - 1``; meta tensors have no values to check."""
    if index.is_meta or index.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(index))
    if low < 0 or high >= bound:
        wrong = low if low < 0 else high
        raise ValueError(f"{key}: index {wrong} is outside 0..{bound - 1}")


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def of_slot(index: Tensor, slot: int) -> Tensor:
    """Returns the int64 indices ``[n]`` of one slot from a shared or per-slot index set."""
    return (index if index.dim() == 1 else index[slot]).long()


def take_columns(x: Tensor, cols: Tensor | None, slot: int) -> Tensor:
    """Returns the inputs ``[T, C]`` that a term reads of ``x [T, in]``."""
    return x if cols is None else x.index_select(1, of_slot(cols, slot))


def place_rows(part: Tensor, rows: Tensor | None, slot: int, out_features: int) -> Tensor:
    """Returns ``[T, out]`` with ``part [T, R]`` in a term's output rows and zero elsewhere."""
    if rows is None:
        return part
    placed = part.new_zeros(part.shape[0], out_features)
    # Twice as fast as index_copy on a CPU.
    return placed.scatter_(1, of_slot(rows, slot).expand(part.shape), part)


def place_block(
    block: Tensor,
    rows: Tensor | None,
    row_slot: int,
    cols: Tensor | None,
    col_slot: int,
    size: tuple[int, int],
) -> Tensor:
    """Returns the full matrix ``[out, in]`` that has ``block [R, C]`` in the term's rows, columns.

    Args:
        block: The stored entries.
        rows: The term's output rows, if it does not touch all.
        row_slot: Slot for per-slot rows.
        cols: The term's input columns, if it does not touch all.
        col_slot: Slot for per-slot columns.
        size: ``(out, in)``.
    """
    if cols is not None:
        wide = block.new_zeros(block.shape[0], size[1])
        block = wide.index_copy(1, of_slot(cols, col_slot), block)
    if rows is not None:
        tall = block.new_zeros(size)
        block = tall.index_copy(0, of_slot(rows, row_slot), block)
    return block
