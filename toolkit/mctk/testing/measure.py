"""What the kit measures by itself: statistics that are read, terms that are equal, errors made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..contract import implements
from ..hookspecs import Method
from ..statistics import LayerStatistics, Moment, Need, SecondMoment
from ..terms import Bank, Term


class Recorded(LayerStatistics):
    """Statistics that remember what was read of them.

    Attributes:
        asked: The needs whose values were read, in order.
    """

    def __init__(self, of: LayerStatistics) -> None:
        self.__dict__.update(of.__dict__)
        self.asked: list[Need] = []

    def __getitem__(self, need: Need) -> Any:
        self.asked.append(need)
        return super().__getitem__(need)

    def unseen(self, need: Need) -> Any:
        """A statistic that the kit reads, not the method."""
        return super().__getitem__(need)

    def same(self, need: Need) -> Need:
        """A need, written as every need is that has the same value in this layer."""
        return need.canonical(self._banks)


def moment_of(bank: str) -> SecondMoment:
    """By what errors of a bank's outputs are measured."""
    return SecondMoment(bank, "input")


def measure_needs(method: Method, bank: str) -> list[Need]:
    """What a method's curve is measured by: where it is squared errors of single banks."""
    measurable = method.scope == "bank" and method.units == "squared_error"
    return [moment_of(bank)] if measurable and implements(method, "curve") else []


def squared_error(bank: Bank, terms: list[Term], moment: Moment) -> tuple[float, float] | None:
    """The squared error of new terms' outputs over all tokens, summed over the members.

    Args:
        bank: The bank as it was.
        terms: What is to take the place of its terms.
        moment: The second moment of its inputs, [members, in, in].

    Returns:
        The error, and the square of the bank's own outputs; None where a member has seen fewer
        tokens than its inputs are wide: a method may well reckon with more than it saw there.
    """
    if int(moment.count.min()) < bank.shape.in_features:
        return None
    after = Bank(bank.name, bank.layer, bank.shape, terms)
    error = output = 0.0
    for member in range(bank.shape.members):
        before, now = bank.materialise(member)[0], after.materialise(member)[0]
        if before is None:
            continue
        whole = before.double()
        gone = whole if now is None else whole - now.double()
        inputs = moment.value[member].to(whole)
        error += float((gone @ inputs * gone).sum())
        output += float((whole @ inputs * whole).sum())
    return error, output


def stored(terms: Mapping[str, list[Term]]) -> tuple[int, int]:
    """Parameters and bytes of terms."""
    every = [term for listed in terms.values() for term in listed]
    return sum(term.parameters() for term in every), sum(term.nbytes() for term in every)


def digests(terms: Mapping[str, list[Term]]) -> dict[str, str]:
    """Hashes of terms by bank: of their specs and of all their numbers."""
    found = {}
    for name, listed in terms.items():
        hashed = hashlib.sha256()
        for term in listed:
            hashed.update(repr(sorted(term.spec().items(), key=lambda item: item[0])).encode())
            for part, tensor in sorted(term.stored().items()):
                flat = tensor.detach().cpu().contiguous()
                hashed.update(part.encode() + flat.view(torch.uint8).numpy().tobytes())
        found[name] = hashed.hexdigest()
    return found
