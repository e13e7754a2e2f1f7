"""Dynamic expert skipping: a policy of the run time that travels with the terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mctk.terms.indices import SlotMap
from mctk.terms.shape import BankShape
from mctk.terms.term import Term


class ExpertSkip(Term):
    """Says which of a token's experts a forward skips; stores nothing and adds nothing.

    A token's choices are ranked by their routing weights, ``w_1 ≥ w_2 ≥ ... ≥ w_k``. As many of
    them are skipped, the smallest first, as there are ranks j with ``w_j < ratio_j · w_1``; what is
    left is scaled to the same sum of weights (NAEE, arXiv 2402.14800, for k = 2). It stands in
    the bank of down and serves no member, so a removed expert stays removed.

    Args:
        shape: The bank's shape.
        ratios: ``ratio_2 ... ratio_k``, not negative. Without any nothing is skipped: so a plan
            has it, before data have told.
        shares: Of the tokens that the ratios were taken from, the shares for which 1, 2, ..., k
            experts are computed; active parameters and multiplications follow from it.
    """

    kind: ClassVar[str] = "skip"

    def __init__(
        self, shape: BankShape, ratios: Sequence[float] = (), shares: Sequence[float] = (1.0,)
    ) -> None:
        for key, values in (("ratios", ratios), ("shares", shares)):
            numbers = isinstance(values, Sequence) and all(
                isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf")
                for v in values
            )
            if not numbers:
                raise ValueError(f"{key}: must be a list of numbers, 0 or more, not {values!r}")
        if len(shares) != len(ratios) + 1:
            raise ValueError(f"shares: has {len(shares)} entries, expected {len(ratios) + 1}")
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares: add up to {sum(shares)}, not to 1")
        self.shape = shape
        self.ratios = tuple(float(value) for value in ratios)
        self.shares = tuple(float(value) for value in shares)

    def skip(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Decides which choices are computed, and scales their weights to the same sum.

        Args:
            weights: Routing weights, ``[T, k]``, not negative, in any order.

        Returns:
            Weights ``[T, k]``, zero where a choice is skipped, and which choices are computed,
            bool ``[T, k]``: of each token at least one.

        Raises:
            ValueError: Tokens choose another number of experts than the policy is for.
        """
        if not self.ratios:
            return weights, torch.ones_like(weights, dtype=torch.bool)
        k = weights.shape[1]
        if k != len(self.ratios) + 1:
            raise ValueError(
                f"tokens choose {k} experts, the skip term is for {len(self.ratios) + 1}"
            )
        ranked = weights.sort(dim=1, descending=True, stable=True)
        ratios = torch.tensor(self.ratios, dtype=weights.dtype, device=weights.device)
        limits = ranked.values[:, :1] * ratios
        skipped = (ranked.values[:, 1:] < limits).sum(dim=1, keepdim=True)
        stays = torch.arange(k, device=weights.device) < k - skipped
        kept = torch.empty_like(stays).scatter_(1, ranked.indices, stays)
        left = weights * kept
        # Where nothing was skipped the factor is 1 exactly.
        total = left.sum(dim=1, keepdim=True)
        factor = torch.where(total > 0, weights.sum(dim=1, keepdim=True) / total, 1.0)
        return left * factor.to(weights.dtype), kept

    @property
    def slots(self) -> SlotMap:
        """See `Term.slots`: no member has any."""
        return (None,) * self.shape.members

    def slot_maps(self) -> dict[str, SlotMap]:
        """See `Term.slot_maps`: there is none to restrict when members go."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`: none."""
        return {}

    @property
    def dtype(self) -> torch.dtype:
        """See `Term.dtype`; without weights it is the narrowest, so that it decides nothing."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        """See `Term.device`; without tensors it is nowhere."""
        return torch.device("cpu")

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {"ratios": list(self.ratios), "shares": list(self.shares)}

    @classmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> ExpertSkip:
        """See `Term.build`."""
        return cls(shape, settings["ratios"], settings["shares"])

    def macs(self, member: int) -> int:
        """See `Term.macs`."""
        return 0

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Term.materialise`."""
        return None, None

    def apply(self, x: Tensor, member: int) -> Tensor:
        """See `Term.apply`."""
        return self._no_output(x)
