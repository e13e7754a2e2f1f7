"""Colours and markers in figures: methods are told apart, and rounding makes a marker hollow.

Few methods, or methods of one kind, have a colour each. Of many a colour is a family, by the stages
of their steps, and the marker tells the family's methods apart. What is rounded afterwards looks as
it would without, but hollow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .result import Row

# Dark enough for text on white (contrast 4.5 and more), and told apart by colour-blind readers:
# Okabe and Ito's hues, darkened.
COLOURS = ("#0060a8", "#b34700", "#00705a", "#a0357a", "#6b5200", "#46418c", "#8f1d2c", "#3d5a6c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">", "d")
GREY, INK, PALE = "#5f6368", "#1c1e21", "#d5d8dc"
ROUNDING = "quantize"


@dataclass(frozen=True)
class Look:
    """How a row is drawn.

    Attributes:
        colour: Of line, marker and label.
        marker: Matplotlib's name.
        filled: Whether the marker is solid; hollow: its terms are rounded as well.
    """

    colour: str
    marker: str
    filled: bool = True


@dataclass(frozen=True)
class Looks:
    """The looks of a comparison's rows.

    Attributes:
        rows: Key of a row → its method's name: of a rounded one that of the same steps without.
        methods: Method → its look, solid.
        labels: Method → what to call it.
        families: Family → its colour; empty where each method has its own.
    """

    rows: dict[str, str]
    methods: dict[str, Look]
    labels: dict[str, str]
    families: dict[str, str]

    def of(self, row: Row) -> Look:
        """A row's own look."""
        look = self.methods[self.rows[row.key]]
        return Look(look.colour, look.marker, not is_composed(row))


def family_of(row: Row) -> str:
    """The stages of a row without the rounding that may end it."""
    stages = [stage for stage in row.family.split("+") if stage != ROUNDING]
    return "+".join(stages) or ROUNDING


def is_composed(row: Row) -> bool:
    """Whether something else was rounded."""
    return ROUNDING in row.family.split("+") and family_of(row) != ROUNDING


def looks(rows: Sequence[Row]) -> Looks:
    """The looks of all rows, in order of appearance; rounding alone is a black star."""
    plain = {_unrounded(row): row.name for row in reversed(rows) if not is_composed(row)}
    of_row, labels = {}, {}
    members: dict[str, list[str]] = {}
    for row in rows:
        family = family_of(row)
        steps = _unrounded(row)
        method = ROUNDING if family == ROUNDING else row.name
        if is_composed(row):
            method = plain.get(steps, steps)
        of_row[row.key] = method
        if method not in labels or not is_composed(row):
            labels[method] = "rounded" if method == ROUNDING else row.label
        listed = members.setdefault(family, [])
        if method not in listed:
            listed.append(method)
    found = {ROUNDING: Look(INK, "*")} if members.pop(ROUNDING, None) else {}
    methods = [method for family in members.values() for method in family]
    families = {}
    if len(members) == 1 or len(methods) <= len(COLOURS):
        for place, method in enumerate(methods):
            marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
            found[method] = Look(COLOURS[place % len(COLOURS)], marker)
    else:
        for number, (family, listed) in enumerate(members.items()):
            families[family] = COLOURS[number % len(COLOURS)]
            first = number // len(COLOURS)  # beyond the last colour: begin with another marker
            for place, method in enumerate(listed):
                found[method] = Look(families[family], MARKERS[(first + place) % len(MARKERS)])
    return Looks(of_row, found, labels, families)


def _unrounded(row: Row) -> str:
    """A row's steps with their options, without sizes and rounding: equal where methods are."""
    steps = [
        [step.method, step.targets, step.layers, step.options]
        for step in row.steps
        if not step.method.startswith(f"{ROUNDING}/")
    ]
    return json.dumps([steps, row.allocate, row.propagate], default=str)
