"""Which layers a step works on, as recipes write it: all, 3, [0, 1] or 0-3,5."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layers:
    """Which layers a step works on: ranges with both ends, or None for all."""

    ranges: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def parse(cls, value: Any) -> Layers:
        """Reads "all", "0-3,5", 3 or [0, 1, "4-6"].

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(value, Layers):
            return value
        if value == "all":
            return cls()
        if isinstance(value, str):
            parts: list[Any] = [part.strip() for part in value.split(",")]
        else:
            parts = value if isinstance(value, list) else [value]
        ranges = []
        for part in parts:
            ends = re.fullmatch(r"([0-9]+)(?:\s*-\s*([0-9]+))?", str(part))
            if isinstance(part, bool) or ends is None:
                raise ValueError(
                    f"{part!r} is no layer range; write all, 3, [0, 1] or 0-3,5 (counted from 0)"
                )
            first, last = int(ends[1]), int(ends[2] or ends[1])
            if last < first:
                raise ValueError(f"range {part} runs backwards; write {last}-{first}")
            ranges.append((first, last))
        if not ranges:
            raise ValueError("names no layer; write all, or leave the step out")
        return cls(tuple(ranges))

    def __contains__(self, layer: int) -> bool:
        return self.ranges is None or any(first <= layer <= last for first, last in self.ranges)

    def __str__(self) -> str:
        if self.ranges is None:
            return "all"
        return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self.ranges)
