"""The run time of experts that share something: what is shared is computed once per token.

``y = Σ_e g_e (W_b h_e + U_e V_e h_e) = W_b (Σ_e g_e h_e) + Σ_e U_e (g_e V_e h_e)``: a base of gate
or up is multiplied once with each token, before the activation, which every expert has for itself;
a base of down once with the weighted sum of what its experts activate. Exact, as everything after
the activation is linear. So a token that visits k experts costs ``p + k ρ`` of an expert instead
of ``k (p + ρ)``, with p the base's and ρ the deltas' share of it.

Which terms are shared is decided once, from the slot maps:

- a matrix (dense, sparse or low rank) whose slots serve several members each: once for each
  distinct pair of a token and a slot;
- a low rank of gate or up with shared V: ``V x`` once per pair; one of down with shared U:
  ``U z`` once per pair, on the weighted sum;
- everything else by rows, sorted by expert.

Experts that agree in all terms of gate, up and down are a *merged group*: they are one expert with
several router rows. A token that chose several of them is one row, with the sum of their routing
weights, so that activations and a norm on each expert's output are computed once as well.

Sources: D²-MoE (arXiv 2502.17298) for base and deltas; there both are computed per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms import Bank, Dense, DynamicDense, LowRank, Sparse, Term
from .dynamic import ColumnNorms, Skips, choose, dynamic_index, probe_of
from .products import add_by_rows, add_outer_by_rows, add_shared, inner_by_rows, on_segments
from .rows import Groups, Pairs, Rows, shared_groups

# Rows that a CPU takes at a time, at least and at most. With all 1024 rows of 512 tokens at once
# (3584 channels) activating them takes four times as long.
_BLOCK = (64, 256)


@dataclass(frozen=True)
class Role:
    """How the run time computes a term.

    Attributes:
        groups: Members that share what is computed once per token; None: everything by rows.
        whole: The whole term is shared, not just one factor of it.
        inner: If it is one factor: whether that is V, and not U.
    """

    groups: Groups | None
    whole: bool
    inner: bool = False


def role(term: Term, part: str, merged: Sequence[int] | None = None) -> Role:
    """Returns how a term is computed.

    Args:
        term: The term, on any device.
        part: "gate", "up" or "down".
        merged: The module's merged groups, see `merged_groups`: they are rows already.
    """
    if isinstance(term, DynamicDense) and term.drop:
        return Role(term.slots, True)  # its choice is made by slot, shared or not
    if type(term) in (Dense, DynamicDense, Sparse):
        return Role(shared_groups(term.slots, merged), True)
    if isinstance(term, LowRank):
        both = [
            None if u is None else (u, v) for u, v in zip(term.u_slots, term.v_slots, strict=True)
        ]
        groups = shared_groups(both, merged)
        if groups is not None:
            return Role(groups, True)
        inner = part != "down"
        factor = term.v_slots if inner else term.u_slots
        return Role(shared_groups(factor, merged), False, inner)
    return Role(None, False)


def merged_groups(terms: Mapping[str, Sequence[Term]]) -> tuple[int, ...] | None:
    """Returns which experts compute the same: for each expert the first that agrees with it.

    Experts agree if their slots do in every term of every bank, which the slot maps alone tell. An
    expert without any term is by itself.

    Args:
        terms: "gate" (if there is one), "up", "down" → the terms, on any device.

    Returns:
        ``[E]``, or None where no two experts agree.
    """
    every = [term for bank in terms.values() for term in bank]
    if not every:
        return None
    first: dict[object, int] = {}
    found = []
    for e in range(every[0].shape.members):
        key = tuple(_uses(term, e) for term in every)
        alone = all(use is None for use in key)
        found.append(e if alone else first.setdefault(key, e))
    return tuple(found) if len(set(found)) < len(found) else None


def _uses(term: Term, member: int) -> object:
    """What a member uses of a term (comparable), None if nothing."""
    if not term.has(member):
        return None
    return tuple(slots[member] for slots in term.slot_maps().values())


class SharedPath:
    """What experts share of a module's terms, and which of them are merged.

    Args:
        terms: "gate" (if there is one), "up", "down" → the terms, on any device.
        norm: Each expert's output goes through a norm of its own: down is then computed by
            expert (by merged group), because the sum over experts may not be drawn into it.

    Attributes:
        merged: See `merged_groups`.
        roles: Part → how each of its terms is computed.
        dynamic: The place in down of the term that decides what is skipped, None without any.
        shares: Whether anything is computed for several choices at once.

    Raises:
        CheckpointError: Dynamic terms do not fit together.
    """

    def __init__(self, terms: Mapping[str, Sequence[Term]], norm: bool) -> None:
        self.merged = merged_groups(terms)
        self.roles = {
            part: [role(term, part, self.merged) for term in bank] for part, bank in terms.items()
        }
        if norm:
            self.roles["down"] = [Role(None, False) for _ in terms["down"]]
        self.dynamic = dynamic_index(terms)
        self.shares = self.merged is not None or any(
            r.groups is not None for bank in self.roles.values() for r in bank
        )


class Forward:
    """One forward of a `SharedPath`.

    Args:
        path: What is shared.
        banks: The banks with the tensors that the module holds now.
        x: The tokens in the terms' dtype, ``[T, H]``.
        choices: Chosen experts, ``[T, k]``.
        weights: Routing weights, ``[T, k]``.
        experts: How many experts there are.
        activate: ``[n, 2I]`` (gate, up) or ``[n, I]`` (no gate) → the inputs of down, ``[n, I]``.
        norm: What each expert's output goes through, if anything.
        norms: Column norms of the dynamic base of down.
        skipping: Whether dynamic terms skip channels.
        kept: Which choices are computed, ``[T, k]``; None: all.
    """

    def __init__(
        self,
        path: SharedPath,
        banks: Mapping[str, Bank],
        x: Tensor,
        choices: Tensor,
        weights: Tensor,
        experts: int,
        *,
        activate: Callable[[Tensor], Tensor],
        norm: Callable[[Tensor], Tensor] | None,
        norms: ColumnNorms,
        skipping: bool,
        kept: Tensor | None = None,
    ) -> None:
        self._path = path
        self._banks = banks
        self._wide = [part for part in banks if part != "down"]
        self._x = x
        self.rows = Rows(choices, experts, path.merged, kept)
        self._weights = self.rows.weights(weights)
        self._activate = activate
        self._norm = norm
        self._norms = norms
        self._pairs: dict[Groups, Pairs] = {}
        self._inners: dict[int, Tensor] = {}
        self.skips: Skips | None = None
        self._skipping = skipping and path.dynamic is not None and choices.numel() > 0

    def run(self) -> Tensor:
        """Returns the weighted sum of the experts' outputs, ``[T, H]``, in the wider type."""
        h = self._hidden()
        return self._down(h) if self._norm is None else self._normed_down(h, self._norm)

    def choose(self) -> Skips | None:
        """Returns what this forward skips, None if nothing, without computing the rest of it."""
        if self._skipping and self.skips is None:
            self._probe()
        return self.skips

    def _hidden(self) -> Tensor:
        """The inputs of down, [n, I]."""
        if not self._skipping:
            return self._rows_hidden(self.rows)
        probed, h = self._probe()
        rest = ~probed
        if bool(rest.any()):
            h = h.index_copy(0, rest.nonzero()[:, 0], self._rows_hidden(self.rows.subset(rest)))
        return h

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Runs the probe and makes the choice; which rows it was, [n], and its part of [n, I]."""
        assert self._path.dynamic is not None
        term = self._banks["down"].terms[self._path.dynamic]
        assert isinstance(term, DynamicDense)
        pairs = self._of(term.slots)
        skips = self.skips = Skips(pairs, probe_of(pairs, self._x), {})
        probed = skips.of_rows(self.rows)
        part = self._rows_hidden(self.rows.subset(probed))
        h = part.new_zeros(probed.numel(), part.shape[1])
        h = h.index_copy(0, probed.nonzero()[:, 0], part)
        skips.dropped = choose(term, skips, pairs.sum_rows(h, self._weights), self._norms)
        return probed, h

    def _of(self, groups: Groups) -> Pairs:
        if groups not in self._pairs:
            self._pairs[groups] = Pairs(groups, self.rows)
        return self._pairs[groups]

    def _rows_hidden(self, rows: Rows) -> Tensor:
        """The inputs of down of some rows, [m, I]."""
        bases = self._bases()
        if self._x.device.type != "cpu":
            return self._block_hidden(bases, rows)
        # Small blocks stay in the cache and reuse memory that is already mapped.
        blocks = rows.blocks(*_BLOCK)
        if len(blocks) == 1:
            return self._block_hidden(bases, rows)
        h = self._x.new_empty(rows.places.numel(), self._banks["down"].shape.in_features)
        for start, block in blocks:
            h[start : start + block.places.numel()] = self._block_hidden(bases, block)
        return h

    def _bases(self) -> list[tuple[Pairs, Tensor]]:
        """What gate and up share, for all pairs of each slot map: [P, 2I] (or [P, I])."""
        width = self._banks["up"].shape.out_features
        found: dict[Groups, Tensor] = {}
        filled = set()
        for i, part in enumerate(self._wide):
            for term, how in zip(self._banks[part].terms, self._path.roles[part], strict=True):
                if how.groups is None or not how.whole:
                    continue
                pairs = self._of(how.groups)
                if how.groups not in found:
                    size = width * len(self._wide)
                    found[how.groups] = self._x.new_zeros(pairs.count, size)
                out = found[how.groups][:, i * width : (i + 1) * width]
                if self.skips is not None and isinstance(term, DynamicDense) and term.drop:
                    out += self.skips.shared(term, self._x)
                else:
                    x = self._per_pair(pairs)
                    for s in pairs.segments:
                        first = (how.groups, i) not in filled
                        add_shared(
                            out[s.start : s.stop], term, x[s.start : s.stop], s.expert, first
                        )
                filled.add((how.groups, i))
        return [(self._of(groups), values) for groups, values in found.items()]

    def _per_pair(self, pairs: Pairs) -> Tensor:
        """The tokens of pairs, [P, H]."""
        return self._x if pairs.whole else self._x.index_select(0, pairs.token)

    def _block_hidden(self, bases: list[tuple[Pairs, Tensor]], rows: Rows) -> Tensor:
        """The inputs of down of some rows, [m, I], from what is shared and their own terms."""
        width = self._banks["up"].shape.out_features
        fused: Tensor | None = None
        for pairs, values in bases:
            part = pairs.to_rows(values, rows)
            fused = part if fused is None else fused + part
        if fused is None:
            fused = self._x.new_zeros(rows.places.numel(), width * len(self._wide))
        inputs: Tensor | None = None
        for i, name in enumerate(self._wide):
            out = fused[:, i * width : (i + 1) * width]
            for term, how in zip(self._banks[name].terms, self._path.roles[name], strict=True):
                if how.groups is None:
                    if inputs is None:
                        inputs = self._x.index_select(0, rows.token)
                    add_by_rows(out, term, inputs, rows)
                elif not how.whole:
                    assert isinstance(term, LowRank)
                    pairs = self._of(how.groups)
                    add_outer_by_rows(
                        out, term, pairs.to_rows(self._inner(term, pairs), rows), rows
                    )
        return self._activate(fused)

    def _inner(self, term: LowRank, pairs: Pairs) -> Tensor:
        """``V x`` of a shared V, once for each pair, [P, r]."""
        if id(term) not in self._inners:
            x = self._per_pair(pairs)
            self._inners[id(term)] = on_segments(x, pairs.segments, term.inner, term.rank)
        return self._inners[id(term)]

    def _down(self, h: Tensor) -> Tensor:
        """The outputs, [T, H], in the wider type."""
        weights, rows, bank = self._weights, self.rows, self._banks["down"]
        tokens = weights.shape[0]
        dtype = torch.promote_types(h.dtype, weights.dtype)
        row_weights = weights.reshape(-1)[rows.places][:, None]
        own = h.new_zeros(h.shape[0], bank.shape.out_features)
        total = h.new_zeros(tokens, bank.shape.out_features, dtype=dtype)
        sums: dict[Groups, Tensor] = {}
        for term, how in zip(bank.terms, self._path.roles["down"], strict=True):
            if how.groups is None:
                add_by_rows(own, term, h, rows, row_weights)
                continue
            pairs = self._of(how.groups)
            if how.whole:
                if how.groups not in sums:
                    sums[how.groups] = pairs.sum_rows(h, weights).to(h.dtype)
                z = sums[how.groups]
                function: Callable[[Tensor, int], Tensor] = term.apply
                if self.skips is not None and isinstance(term, DynamicDense) and term.drop:
                    function = self._skipping_apply(term)
            else:
                assert isinstance(term, LowRank)
                z = pairs.sum_rows(inner_by_rows(term, h, rows), weights).to(h.dtype)
                function = term.outer
            total = total + pairs.to_tokens(
                on_segments(z, pairs.segments, function, total.shape[1])
            )
        if any(how.groups is None for how in self._path.roles["down"]):
            total = total + self._over_choices(own, dtype)
        return total

    def _over_choices(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums rows over each token's choices, [n, H] → [T, H], in the order of the choices."""
        ordered = self.rows.padded(values).index_select(0, self.rows.inverse().reshape(-1))
        return ordered.view(*self._weights.shape, -1).sum(1, dtype=dtype)

    def _normed_down(self, h: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Down by expert, with a norm on each expert's output, [T, H], in the wider type."""
        bank = self._banks["down"]
        dtype = torch.promote_types(h.dtype, self._weights.dtype)
        out = h.new_zeros(h.shape[0], bank.shape.out_features, dtype=dtype)
        for s in self.rows.segments:
            if any(term.has(s.expert) for term in bank.terms):
                part = h[s.start : s.stop]
                y = bank.apply(part, s.expert) if self.skips is None else self.skips.apply(
                    bank, part, s.expert, None
                )  # fmt: skip
                out[s.start : s.stop] = norm(y).to(dtype)
        weights = self._weights.reshape(-1)[self.rows.places][:, None]
        return self._over_choices(out * weights, dtype)

    def _skipping_apply(self, term: DynamicDense) -> Callable[[Tensor, int], Tensor]:
        assert self.skips is not None
        dropped = self.skips.dropped

        def apply(z: Tensor, member: int) -> Tensor:
            slot = term.slots[member]
            assert slot is not None
            return term.without(z, member, dropped[slot])

        return apply
