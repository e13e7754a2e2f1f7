"""The base of methods that select experts by a score: all but the score and what is left."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from mctk.hookspecs import Method

from mctk_prune.choice import ChoiceOptions

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import BankShape
    from torch import Tensor


class Selection(Method):
    """Removes the experts of the lowest scores; a setting is how many stay.

    What is removed is gone: the router loses the experts' rows and chooses among the others. A
    subclass says what the scores are (`asks`, `scores`), and, if something takes the place of an
    expert, what (`left`, `left_of_one`, `groups`).
    """

    stage = "prune"
    scope = "experts"
    takes_size = True
    same_size = True
    units = "score"
    Options = ChoiceOptions

    def asks(self, options: Any) -> list[Need]:
        """What the scores, and what takes an expert's place, are made of."""
        return []

    @abstractmethod
    def scores(self, layer: int, experts: int, statistics: Any, options: Any) -> Tensor:
        """Scores of the E experts of a layer, float64 [E], none of them negative."""

    def groups(self, banks: Layer) -> int:
        """Of how many runs of experts equally many have to stay."""
        return next(iter(banks.values())).groups

    def left_of_one(self, banks: Layer) -> int:
        """Parameters that take the place of an expert."""
        return 0

    def left(self, banks: Layer, kept: list[int], statistics: Any) -> dict[str, list[Any]]:
        """The banks' terms when some experts stay; `statistics` is None for banks on meta."""
        from mctk.terms import drop_members

        members = next(iter(banks.values())).shape.members
        gone = [expert for expert in range(members) if expert not in kept]
        return {name: drop_members(bank, gone) for name, bank in banks.items()}

    # The hooks.

    def needs(self, shape: BankShape, bank: str, options: Any) -> list[Need]:
        """What `asks` says, once a layer."""
        return self.asks(options) if bank == "experts.down" else []

    def sizes(self, banks: Layer, options: Any) -> tuple[list[int], list[int]]:
        """Numbers of experts, and what the banks then store."""
        from mctk.terms import DENSE

        from mctk_prune.choice import cost_of_one, present

        counts = self._counts(banks, options)
        total = sum(bank.parameters() for bank in banks.values())
        saved = cost_of_one(banks) - self.left_of_one(banks)
        there = len(present(banks))
        return [*counts, DENSE], [*(total - (there - count) * saved for count in counts), total]

    def layout(self, banks: Layer, size: int | None, options: Any) -> Terms:
        """The banks with so many experts: which ones needs data, what they store does not."""
        import torch

        from mctk_prune.choice import choose

        keep = self._keep(banks, size, options)
        if keep is None:
            return {}
        equal = torch.zeros(next(iter(banks.values())).shape.members)
        return self.left(banks, choose(banks, equal, keep, self.groups(banks), options), None)

    def curve(self, banks: Layer, statistics: Any, options: Any) -> list[float]:
        """Sum of the scores of those that go, per number that stays."""
        from mctk.terms import DENSE

        from mctk_prune.choice import choose, present

        found = self._scores(banks, statistics, options)
        everything = set(present(banks))
        errors = []
        for size in self.sizes(banks, options)[0]:
            keep = len(everything) if size == DENSE else size
            kept = choose(banks, found, keep, self.groups(banks), options)
            errors.append(float(found[sorted(everything.difference(kept))].sum()))
        return errors

    def prune(self, layer: Layer, statistics: Any, size: int | None, options: Any) -> Terms:
        """Keeps `size` experts."""
        from mctk_prune.choice import choose, tell_ties

        keep = self._keep(layer, size, options)
        if keep is None:
            return {}
        found, groups = self._scores(layer, statistics, options), self.groups(layer)
        kept = choose(layer, found, keep, groups, options)
        tell_ties(layer, found, kept, groups, options)
        return self.left(layer, kept, statistics)

    def _counts(self, banks: Layer, options: Any) -> list[int]:
        from mctk_prune.choice import counts

        return counts(banks, options, self.groups(banks), f"{self.stage}/{self.name}")

    def _keep(self, banks: Layer, size: int | None, options: Any) -> int | None:
        """How many experts stay; None for all."""
        from mctk.terms import DENSE

        from mctk_prune.choice import check_count, present

        possible = self._counts(banks, options)
        if size is None or size == DENSE:
            return None
        check_count(banks, size, possible, f"{self.stage}/{self.name}")
        return None if size == len(present(banks)) else size

    def _scores(self, banks: Layer, statistics: Any, options: Any) -> Tensor:
        first = next(iter(banks.values()))
        return self.scores(first.layer, first.shape.members, statistics, options)
