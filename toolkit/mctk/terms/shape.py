"""The shape of a bank."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class BankShape:
    """How many matrices a bank has and how large each is.

    Attributes:
        members: Number of matrices (experts, or layers, or 1).
        out_features: Rows of each matrix.
        in_features: Columns of each matrix.
    """

    members: int
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer, not {value!r}")

    @property
    def parameters(self) -> int:
        """Elements of the bank when every member is a full matrix of its own."""
        return self.members * self.out_features * self.in_features
