"""Fewer members: terms from which some experts are gone, and banks that no longer know them.

A removed expert is a member for which no term of any of its layer's experts banks has a slot. While
a layer is worked on its banks keep all their members (`drop_members`), so that experts bear the
numbers that statistics and routers know; what is written holds the others only (`compact`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from mctk.terms.bank import Bank
from mctk.terms.indices import SlotMap
from mctk.terms.shape import BankShape
from mctk.terms.term import Term

_EXPERTS = "experts."


def drop_members(bank: Bank, members: Iterable[int]) -> list[Term]:
    """Returns the bank's terms without some members, of any kind of term.

    The members' slots become None. What is stored for them alone (matrices, factors, per-slot rows
    and columns, energies) is left out, and so is a term that nobody has any more; what they share
    with others stays.

    Args:
        bank: A bank of any terms.
        members: Who goes; members that are gone already may be named again.

    Raises:
        ValueError: A member does not exist, or none would be left.
    """
    gone = _checked(bank, members)
    if len(gone) == bank.shape.members:
        raise ValueError(f"{bank.name} of layer {bank.layer}: all {len(gone)} members would go")
    found = []
    for term in bank.terms:
        if not any(term.has(member) for member in gone):
            found.append(term)
            continue
        changed = _restrict(
            term,
            term.shape,
            {
                key: tuple(None if member in gone else slot for member, slot in enumerate(slots))
                for key, slots in term.slot_maps().items()
            },
        )
        if changed is not None:
            found.append(changed)
    return found


def removed_members(banks: Iterable[Bank]) -> tuple[int, ...]:
    """Returns a layer's removed experts, ascending: no term of any experts bank has them.

    Args:
        banks: The layer's banks, all `experts.*` among them; others are passed over.

    Raises:
        ValueError: The experts banks differ in their members.
    """
    experts = [bank for bank in banks if bank.name.startswith(_EXPERTS)]
    counts = {bank.shape.members for bank in experts}
    if len(counts) > 1:
        raise ValueError(f"experts banks of one layer have {sorted(counts)} members")
    return tuple(
        member
        for member in range(next(iter(counts), 0))
        if not any(term.has(member) for bank in experts for term in bank.terms)
    )


def compact(bank: Bank, kept: Sequence[int]) -> Bank:
    """Returns the bank of some of the members, numbered in the order given.

    Args:
        bank: A bank of any terms.
        kept: The members that stay, each once.

    Raises:
        ValueError: A member does not exist or is named twice, or none is.
    """
    if not kept or len(_checked(bank, kept)) != len(kept):
        raise ValueError(f"{bank.name} of layer {bank.layer}: cannot keep members {list(kept)}")
    if list(kept) == list(range(bank.shape.members)):
        return bank
    shape = replace(bank.shape, members=len(kept))
    terms = [
        _restrict(
            term,
            shape,
            {
                key: tuple(slots[member] for member in kept)
                for key, slots in term.slot_maps().items()
            },
        )
        for term in bank.terms
    ]
    return replace(bank, shape=shape, terms=[term for term in terms if term is not None])


def _checked(bank: Bank, members: Iterable[int]) -> set[int]:
    found = set(members)
    for member in found:
        if not 0 <= member < bank.shape.members:
            raise ValueError(
                f"{bank.name} of layer {bank.layer}: has members 0..{bank.shape.members - 1}, "
                f"not {member}"
            )
    return found


def _restrict(term: Term, shape: BankShape, maps: dict[str, SlotMap]) -> Term | None:
    """The term with other slot maps, less the slots that they do not name; None if that is all.

    A term without tensors says how others are run; it stays.
    """
    used = {
        key: sorted({slot for slot in slots if slot is not None}) for key, slots in maps.items()
    }
    if term.tensors() and not all(used.values()):
        return None
    places = {key: {slot: place for place, slot in enumerate(slots)} for key, slots in used.items()}
    settings = term.settings() | {
        key: [None if slot is None else places[key][slot] for slot in slots]
        for key, slots in maps.items()
    }
    tensors = {}
    for name, tensor in term.tensors().items():
        key = term.slot_map_of(name)
        if key is not None and len(used[key]) < tensor.shape[0]:
            tensor = tensor.index_select(0, torch.tensor(used[key], device=tensor.device))
        tensors[name] = tensor
    return type(term).build(shape, settings, tensors)
