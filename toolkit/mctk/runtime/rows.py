"""The routed (token, choice) pairs of one forward, sorted by expert, and what experts share in it.

Letters: T tokens, k choices each, n rows, P distinct (token, group) pairs. A choice is a row,
n = T·k; where experts were merged, the choices that a token has in one merged group are one row;
choices that are not kept are none.
Every sum over experts here has a fixed order, so that results are the same bit for bit however
often they are computed, on the accelerator too: nothing is added through atomics.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[int | None, ...]
"""For each member the group that it computes something with, or None if it has no part in it."""


@dataclass(frozen=True)
class Segment:
    """The rows ``start .. stop - 1``, all of one expert."""

    expert: int
    start: int
    stop: int


class Rows:
    """Rows sorted by expert, by token within one.

    Args:
        choices: Chosen experts, ``[T, k]``.
        experts: How many there are.
        merged: For each expert the merged group that it belongs to, its number that of the group's
            first member: a token's choices in one group become one row of that member, in the
            place of the first of them. None: every choice is a row.
        kept: Which choices are computed, ``[T, k]``; None: all.

    Attributes:
        choices: As given.
        kept: As given.
        leading: Which choices are rows, ``[T, k]``; None: all.
        places: Of each row its place ``token · k + choice``, ``[n]``.
        token: Of each row its token, ``[n]``.
        counts: Rows of each expert.
        segments: The experts that have rows.

    Raises:
        ValueError: An expert's number is too large.
    """

    def __init__(
        self,
        choices: Tensor,
        experts: int,
        merged: Sequence[int] | None = None,
        kept: Tensor | None = None,
    ) -> None:
        self.choices, self.kept, self.leading = choices, kept, kept
        flat = choices.reshape(-1)
        if flat.numel() and (merged is not None or kept is not None):
            _check(int(flat.max()), experts)
            first = choices
            if merged is not None:
                first = torch.tensor(merged, device=choices.device)[choices]
                same = first[:, :, None] == first[:, None, :]
                self._same = same if kept is None else same & kept[:, None, :]
                self.leading = ~(self._same & _earlier(choices)).any(2)
                self.leading = self.leading if kept is None else self.leading & kept
            assert self.leading is not None
            # Choices that are no rows are sorted behind all experts.
            flat = first.masked_fill(~self.leading, experts).reshape(-1)
        counts = torch.bincount(flat, minlength=experts).tolist()
        if self.leading is None:
            _check(len(counts) - 1, experts)
        counts = counts[:experts]
        self._fill(torch.argsort(flat, stable=True)[: sum(counts)], counts)

    def _fill(self, places: Tensor, counts: list[int]) -> None:
        self.places = places
        self.token = places // self.choices.shape[1] if self.choices.numel() else places
        self.counts = counts
        self.segments = []
        start = 0
        for expert, count in enumerate(counts):
            if count:
                self.segments.append(Segment(expert, start, start + count))
            start += count

    def subset(self, mask: Tensor) -> Rows:
        """Returns the rows where ``mask [n]`` is true, in the same order."""
        picked = self._like()
        counts = [0] * len(self.counts)
        for segment in self.segments:
            counts[segment.expert] = int(mask[segment.start : segment.stop].sum())
        picked._fill(self.places[mask], counts)
        return picked

    def blocks(self, least: int, most: int) -> list[tuple[int, Rows]]:
        """Cuts the rows into consecutive blocks; where each begins, and its rows.

        Args:
            least: Experts are put together until a block has so many rows.
            most: An expert with more rows than this is cut, into equal parts.
        """
        pieces: list[tuple[int, int, int]] = []
        for s in self.segments:
            parts = -(-(s.stop - s.start) // most)
            cuts = [s.start + i * (s.stop - s.start) // parts for i in range(parts + 1)]
            pieces += [(s.expert, a, b) for a, b in itertools.pairwise(cuts)]
        found: list[tuple[int, Rows]] = []
        counts = [0] * len(self.counts)
        begin = 0
        for number, (expert, start, stop) in enumerate(pieces):
            counts[expert] += stop - start
            if stop - begin >= least or number == len(pieces) - 1:
                block = self._like()
                block._fill(self.places[begin:stop], counts)
                found.append((begin, block))
                begin, counts = stop, [0] * len(counts)
        return found

    def _like(self) -> Rows:
        rows = self.__class__.__new__(self.__class__)
        rows.choices, rows.kept, rows.leading = self.choices, self.kept, self.leading
        return rows

    def inverse(self) -> Tensor:
        """Returns of each choice its row, ``[T, k]``, and n of one that is no row.

        Only for all rows, not for a subset.
        """
        count = self.places.numel()
        inverse = self.places.new_full((self.choices.numel(),), count)
        inverse[self.places] = torch.arange(count, device=self.places.device)
        return inverse.view(self.choices.shape)

    def padded(self, values: Tensor) -> Tensor:
        """Returns all rows' values ``[n, w]`` as `inverse` may index them: zeros for no row."""
        if self.leading is None:
            return values
        return torch.cat([values, values.new_zeros(1, values.shape[1])])

    def weights(self, weights: Tensor) -> Tensor:
        """Returns each row's routing weight in its place, the sum over a merged group's choices.

        Args:
            weights: Routing weights, ``[T, k]``.

        Returns:
            ``[T, k]``, zero where a choice is no row.
        """
        if self.leading is None:
            return weights
        if self.leading is not self.kept:
            weights = (self._same * weights[:, None, :]).sum(2, dtype=weights.dtype)
        return weights * self.leading

    def offsets(self) -> Tensor:
        """Returns where each expert's rows end, ``[E]`` int32, as a grouped product takes it."""
        counts = torch.tensor(self.counts, device=self.places.device)
        return counts.cumsum(0).to(torch.int32)


class Pairs:
    """The distinct (token, group) pairs of one forward: what a group shares is done once for each.

    Pairs are sorted by group, by token within one. Of a token's choices in a group the first is the
    pair's *leader*.

    Args:
        groups: For each member its group; members of one merged group have the same.
        rows: All rows of the forward.

    Attributes:
        token: Of each pair its token, ``[P]``.
        of_choice: Of each choice its pair, ``[T, k]``; P where the member has no group, or the
            choice is not computed.
        segments: The groups that were visited; ``expert`` is the group's first member.
        count: P.
        whole: All members are one group: the pairs are the tokens.
    """

    def __init__(self, groups: Groups, rows: Rows) -> None:
        choices = rows.choices
        tokens, k = choices.shape
        device = choices.device
        names = sorted({group for group in groups if group is not None})
        self._rows = rows
        self._inverse = rows.inverse()
        self.segments: list[Segment] = []
        # One group for all: the pairs are the tokens, and nothing needs to be looked up.
        self.whole = len(names) == 1 and None not in groups
        if self.whole:
            self.count = tokens
            self.token = torch.arange(tokens, device=device)
            self.of_choice = self.token[:, None].expand(tokens, k)
            self.segments = [Segment(0, 0, tokens)] if tokens else []
            return
        absent = len(names)
        lookup = [absent if group is None else names.index(group) for group in groups]
        group = torch.tensor(lookup, device=device)[choices]
        if rows.kept is not None:
            group = group.masked_fill(~rows.kept, absent)
        visited = torch.zeros(tokens, absent + 1, dtype=torch.bool, device=device)
        table = visited.scatter(1, group, True)[:, :absent].t()
        self.token = table.nonzero()[:, 1]
        self.count = self.token.numel()
        number = (table.reshape(-1).cumsum(0) - 1).view(absent, tokens)
        number = torch.cat([number, number.new_full((1, tokens), self.count)])
        self.of_choice = number[group, torch.arange(tokens, device=device)[:, None]]
        same = (group[:, :, None] == group[:, None, :]) & _earlier(choices)
        is_row = group != absent
        if rows.leading is not None:
            same, is_row = same & rows.leading[:, None, :], is_row & rows.leading
        # How many of the token's rows before this one are of the same group.
        self._rank = same.sum(2).masked_fill(~is_row, -1)
        start = 0
        for name, size in zip(names, table.sum(1).tolist(), strict=True):
            if size:
                self.segments.append(Segment(groups.index(name), start, start + size))
            start += size

    def to_rows(self, values: Tensor, rows: Rows) -> Tensor:
        """Returns each row's pair's values, ``[P, w]`` → ``[n, w]``; zeros without a group."""
        if self.whole:
            return values.index_select(0, rows.token)
        padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
        return padded.index_select(0, self.of_choice.reshape(-1)[rows.places])

    def sum_rows(self, values: Tensor, weights: Tensor) -> Tensor:
        """Returns the weighted sums over the rows of each pair.

        Args:
            values: ``[n, w]``, all rows.
            weights: The rows' routing weights in their places, ``[T, k]``; see `Rows.weights`.

        Returns:
            ``[P, w]``, in the wider type of the two.
        """
        dtype = torch.promote_types(values.dtype, weights.dtype)
        if self.whole:
            values = self._rows.padded(values)
        if self.whole and values.dtype == weights.dtype:
            return F.embedding_bag(
                self._inverse, values, per_sample_weights=weights.contiguous(), mode="sum"
            )
        weights = weights.to(dtype)
        if self.whole:
            first, *others = range(weights.shape[1])
            total = values.index_select(0, self._inverse[:, first]) * weights[:, first, None]
            for j in others:
                part = values.index_select(0, self._inverse[:, j]).to(dtype)
                total = torch.addcmul(total, part, weights[:, j, None])
            return total
        total = values.new_zeros(self.count, values.shape[1], dtype=dtype)
        for rank in range(weights.shape[1]):
            chosen = self._rank == rank
            # Every pair occurs at most once here: no two rows are added to one place.
            part = values.index_select(0, self._inverse[chosen]) * weights[chosen][:, None]
            total.index_add_(0, self.of_choice[chosen], part)
        return total

    def to_tokens(self, values: Tensor) -> Tensor:
        """Returns the sums over each token's pairs, ``[P, w]`` → ``[T, w]``."""
        if self.whole:
            return values
        padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
        leading = self.of_choice.masked_fill(self._rank != 0, self.count)
        first, *others = range(leading.shape[1])
        total = padded.index_select(0, leading[:, first])
        for j in others:
            total = total + padded.index_select(0, leading[:, j])
        return total


def _check(largest: int, experts: int) -> None:
    if largest >= experts:
        raise ValueError(
            f"expert index {largest} of {experts} experts: expert parallelism is not supported by "
            "mctk's experts"
        )


def _earlier(choices: Tensor) -> Tensor:
    """Which choices come before which, ``[k, k]``."""
    k = choices.shape[1]
    return torch.ones(k, k, dtype=torch.bool, device=choices.device).tril(-1)


def shared_groups(slots: Sequence[object], merged: Sequence[int] | None = None) -> Groups | None:
    """Returns members with equal slots as groups, or None where no two rows have equal ones.

    Args:
        slots: For each member what it uses (comparable), None where it uses nothing.
        merged: For each member the merged group that has one row; None: all have their own.
    """
    merged = range(len(slots)) if merged is None else merged
    names: dict[object, int] = {}
    groups = tuple(None if s is None else names.setdefault(s, len(names)) for s in slots)
    served = {row for row, group in zip(merged, groups, strict=True) if group is not None}
    return groups if len(names) < len(served) else None
