"""Low-rank terms, with both factors stored in full or one of them pivoted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mctk.terms.dense import Dense
from mctk.terms.indices import (
    SlotMap,
    check_float,
    check_index,
    check_same_dtype,
    check_slots,
    place_block,
    place_rows,
    take_columns,
)
from mctk.terms.pivot import pivot_rows
from mctk.terms.shape import BankShape
from mctk.terms.term import Term


class LowRank(Term):
    """A product ``U V`` per pair of slots.

    A factor with one slot for many members is shared. *Pivoted* storage is exact and smaller:
    ``r`` rows of U (or columns of V) are the identity and are not stored, which saves ``r²``
    numbers per slot of that factor. The constructor takes three of the four weights:

    ======== ==== =====================================================================
    storage  side tensors
    ======== ==== =====================================================================
    plain         ``U [Su, out, r]``, ``V [Sv, r, in]``
    pivoted  U    ``C [Su, out - r, r]``, ``pivots [Su, r]``, ``V [Sv, r, in]``
    pivoted  V    ``U [Su, out, r]``, ``C [Sv, r, in - r]``, ``pivots [Sv, r]``
    ======== ==== =====================================================================

    ``pivots`` are the positions of the identity's rows (columns), which need not be sorted; the
    rows (columns) of ``C`` fill the other positions in ascending order. With ``rows`` (``cols``)
    U has R rows instead of ``out`` (V has C columns), and pivots count within them.

    Args:
        shape: The bank's shape.
        u_slots: For each member its slot of U, or None where the term is absent.
        v_slots: For each member its slot of V, None for the same members.
        U: Left factor, unless side U is pivoted.
        V: Right factor, unless side V is pivoted.
        C: What a pivoted factor stores.
        pivots: Where a pivoted factor's identity is.
        rows: Output rows, ``[R]`` or ``[Su, R]``.
        cols: Input columns, ``[C]`` or ``[Sv, C]``.
    """

    kind: ClassVar[str] = "lowrank"

    def __init__(
        self,
        shape: BankShape,
        u_slots: Sequence[int | None],
        v_slots: Sequence[int | None],
        *,
        U: Tensor | None = None,
        V: Tensor | None = None,
        C: Tensor | None = None,
        pivots: Tensor | None = None,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
    ) -> None:
        given = {"U": U, "V": V, "C": C, "pivots": pivots}
        names = {name for name, tensor in given.items() if tensor is not None}
        if names not in ({"U", "V"}, {"C", "pivots", "V"}, {"U", "C", "pivots"}):
            raise ValueError(
                f"tensors: are {sorted(names)}, expected U and V, or C and pivots for one of them"
            )
        self.shape = shape
        self.U = U
        self.V = V
        self.C = C
        self.pivots = pivots
        self.rows = rows
        self.cols = cols
        self._check_shapes()
        self.u_slots = check_slots("u_slots", u_slots, shape.members, self.stored_u)
        self.v_slots = check_slots("v_slots", v_slots, shape.members, self.stored_v)
        for member, (u, v) in enumerate(zip(self.u_slots, self.v_slots, strict=True)):
            if (u is None) != (v is None):
                raise ValueError(f"v_slots[{member}]: is {v}, but u_slots[{member}] is {u}")
        self._order: tuple[Tensor, Tensor] | None = None

    def _check_shapes(self) -> None:
        left, right = self._left, self._right
        name_left = "C" if self.side == "U" else "U"
        name_right = "C" if self.side == "V" else "V"
        for name, factor in ((name_left, left), (name_right, right)):
            if factor.dim() != 3:
                raise ValueError(f"{name}: has shape {list(factor.shape)}, expected 3 dimensions")
        stored_u, stored_v = left.shape[0], right.shape[0]
        rank = left.shape[2]
        n_rows, n_cols = self.shape.out_features, self.shape.in_features
        if self.rows is not None:
            n_rows = check_index("rows", self.rows, stored_u, n_rows)
        if self.cols is not None:
            n_cols = check_index("cols", self.cols, stored_v, n_cols)
        saved_u = rank if self.side == "U" else 0
        saved_v = rank if self.side == "V" else 0
        if rank > (n_rows if self.side == "U" else n_cols) and self.side is not None:
            raise ValueError(f"{name_left}: rank {rank} is larger than the pivoted factor")
        check_float(name_left, left, (stored_u, n_rows - saved_u, rank))
        check_float(name_right, right, (stored_v, rank, n_cols - saved_v))
        if self.pivots is not None:
            stored, bound = (stored_u, n_rows) if self.side == "U" else (stored_v, n_cols)
            if tuple(self.pivots.shape) != (stored, rank):
                raise ValueError(
                    f"pivots: has shape {list(self.pivots.shape)}, expected {[stored, rank]}"
                )
            check_index("pivots", self.pivots, stored, bound)
        check_same_dtype({name_left: left, name_right: right})

    @property
    def storage(self) -> str:
        """``"plain"`` or ``"pivoted"``."""
        return "plain" if self.C is None else "pivoted"

    @property
    def side(self) -> str | None:
        """The factor that is pivoted, ``"U"`` or ``"V"``; None in plain storage."""
        if self.C is None:
            return None
        return "U" if self.U is None else "V"

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self._left.shape[2]

    @property
    def stored_u(self) -> int:
        """Slots of the left factor."""
        return self._left.shape[0]

    @property
    def stored_v(self) -> int:
        """Slots of the right factor."""
        return self._right.shape[0]

    @property
    def _left(self) -> Tensor:
        return self.C if self.U is None else self.U

    @property
    def _right(self) -> Tensor:
        return self.C if self.V is None else self.V

    @property
    def slots(self) -> SlotMap:
        """The slots of U; V has its own map, with None for the same members."""
        return self.u_slots

    def tensors(self) -> dict[str, Tensor]:
        """See `Term.tensors`; which there are depends on the storage."""
        names = ("U", "V", "C", "pivots", "rows", "cols")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def settings(self) -> dict[str, Any]:
        """See `Term.settings`."""
        return {
            "u_slots": list(self.u_slots),
            "v_slots": list(self.v_slots),
            "storage": self.storage,
            **({} if self.side is None else {"side": self.side}),
        }

    def slot_maps(self) -> dict[str, SlotMap]:
        """See `Term.slot_maps`: each factor has its own."""
        return {"u_slots": self.u_slots, "v_slots": self.v_slots}

    def slot_map_of(self, name: str) -> str | None:
        """See `Term.slot_map_of`."""
        if super().slot_map_of(name) is None:
            return None
        pivoted = name in ("C", "pivots")
        return "u_slots" if name in ("U", "rows") or (pivoted and self.side == "U") else "v_slots"

    @classmethod
    def build(
        cls, shape: BankShape, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> LowRank:
        """See `Term.build`."""
        names = ("U", "V", "C", "pivots", "rows", "cols")
        return cls(
            shape,
            settings["u_slots"],
            settings["v_slots"],
            **{name: tensors.get(name) for name in names},
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LowRank:
        """See `Term.with_tensors`."""
        changed = super().with_tensors(tensors)
        assert isinstance(changed, LowRank)
        if changed.pivots is not self.pivots:
            changed._order = None
        return changed

    @property
    def inner_macs(self) -> int:
        """Multiply-adds of ``V x`` for one token: the identity of a pivoted V costs nothing."""
        return self.rank * self._right.shape[2]

    @property
    def outer_macs(self) -> int:
        """Multiply-adds of ``U z`` for one token; likewise."""
        return self._left.shape[1] * self.rank

    def macs(self, member: int) -> int:
        """See `Term.macs`: the identity of a pivoted factor costs nothing."""
        return self.inner_macs + self.outer_macs if self.has(member) else 0

    def factors(self, member: int) -> tuple[Tensor, Tensor]:
        """Returns a member's full factors (U ``[R, r]``, V ``[r, C]``), whatever the storage.

        Raises:
            ValueError: The term is absent in the member.
        """
        u, v = self.u_slots[member], self.v_slots[member]
        if u is None or v is None:
            raise ValueError(f"member {member} has no low-rank term")
        left, right = self._left[u], self._right[v]
        eye = torch.eye(self.rank, dtype=left.dtype, device=left.device)
        if self.side == "U":
            left = torch.cat([eye, left], dim=0).index_select(0, self._positions()[0][u])
        elif self.side == "V":
            right = torch.cat([eye, right], dim=1).index_select(1, self._positions()[0][v])
        return left, right

    def materialise(self, member: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Term.materialise`."""
        u, v = self.u_slots[member], self.v_slots[member]
        if u is None or v is None:
            return None, None
        left, right = self.factors(member)
        size = (self.shape.out_features, self.shape.in_features)
        return place_block(left @ right, self.rows, u, self.cols, v, size), None

    def apply(self, x: Tensor, member: int) -> Tensor:
        """See `Term.apply`."""
        self._check_input(x)
        return self.outer(self.inner(x, member), member) if self.has(member) else self._no_output(x)

    def inner(self, x: Tensor, member: int) -> Tensor:
        """Returns ``V x``, ``[T, r]``, for inputs ``x [T, in]`` of a member that has the term."""
        v = self.v_slots[member]
        assert v is not None
        x = take_columns(x, self.cols, v)
        right = self._right[v]
        if self.side != "V":
            return F.linear(x, right)
        # V = [I C] with its columns permuted: gather the columns, the first r pass as they are.
        x = x.index_select(1, self._positions()[1][v])
        return torch.addmm(x[:, : self.rank], x[:, self.rank :], right.t())

    def outer(self, z: Tensor, member: int) -> Tensor:
        """Returns ``U z``, ``[T, out]``, for what `inner` gave, or a sum of such."""
        u = self.u_slots[member]
        assert u is not None
        part = F.linear(z, self._left[u])
        if self.side == "U":
            part = torch.cat([z, part], dim=1).index_select(1, self._positions()[0][u])
        return place_rows(part, self.rows, u, self.shape.out_features)

    def pivot(self) -> Term:
        """Returns the same products in pivoted storage; computed in float64.

        The identity goes into the factor with fewer slots, into U where both have as many.
        Already pivoted terms are returned as they are. At full rank the identity is all of its
        factor: what is left is a `Dense` term.

        Raises:
            ValueError: Both factors are shared crosswise, or the rank is larger than the factor
                that would hold the identity: there is no pivoted form.
        """
        if self.U is None or self.V is None:
            return self
        pairs = {
            (u, v)
            for u, v in zip(self.u_slots, self.v_slots, strict=True)
            if u is not None and v is not None
        }
        one_u = dict((v, u) for u, v in pairs)
        one_v = dict((u, v) for u, v in pairs)
        if len(one_u) == len(pairs) and self.stored_u <= self.stored_v:
            return self._pivot_u(one_u)._dense_if_whole()
        if len(one_v) == len(pairs):
            return self._pivot_v(one_v)._dense_if_whole()
        if len(one_u) == len(pairs):
            return self._pivot_u(one_u)._dense_if_whole()
        raise ValueError("factors that are shared crosswise have no pivoted form")

    def _dense_if_whole(self) -> Term:
        """The other factor alone, where the pivoted one is a permuted identity: no empty tensors.

        Pivots need not be sorted, so the other factor's rows (columns) are put in their places.
        """
        assert self.C is not None and self.pivots is not None
        if self.C.numel() or not self.pivots.numel():
            return self
        if self.rows is not None or self.cols is not None:
            return self  # positions go by slots, which a dense term has one kind of
        order = self.pivots.long()
        if self.side == "U":
            assert self.V is not None
            weight = torch.empty_like(self.V)
            for u, v in dict.fromkeys(zip(self.u_slots, self.v_slots, strict=True)):
                if u is not None and v is not None:
                    weight[v, order[u]] = self.V[v]
            return Dense(self.shape, self.v_slots, weight)
        assert self.U is not None
        weight = torch.empty_like(self.U)
        for u, v in dict.fromkeys(zip(self.u_slots, self.v_slots, strict=True)):
            if u is not None and v is not None:
                weight[u][:, order[v]] = self.U[u]
        return Dense(self.shape, self.u_slots, weight)

    def _pivot_u(self, one_u: Mapping[int, int]) -> LowRank:
        """Pivots U; ``one_u`` is the only slot of U that each used slot of V meets."""
        assert self.U is not None and self.V is not None
        split = [pivot_rows(left.double()) for left in self.U]
        right = self.V.double().clone()
        for v, u in one_u.items():
            right[v] = split[u][2] @ right[v]
        return LowRank(
            self.shape,
            self.u_slots,
            self.v_slots,
            C=_stack([rest for _, rest, _ in split], self.U),
            pivots=torch.stack([pivots for pivots, _, _ in split]).int(),
            V=right.to(self.V.dtype),
            rows=self.rows,
            cols=self.cols,
        )

    def _pivot_v(self, one_v: Mapping[int, int]) -> LowRank:
        """Pivots V; ``one_v`` is the only slot of V that each used slot of U meets."""
        assert self.U is not None and self.V is not None
        split = [pivot_rows(right.double().t()) for right in self.V]
        left = self.U.double().clone()
        for u, v in one_v.items():
            left[u] = left[u] @ split[v][2].t()
        return LowRank(
            self.shape,
            self.u_slots,
            self.v_slots,
            U=left.to(self.U.dtype),
            C=_stack([rest.t() for _, rest, _ in split], self.V),
            pivots=torch.stack([pivots for pivots, _, _ in split]).int(),
            rows=self.rows,
            cols=self.cols,
        )

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Returns two permutations per slot of the pivoted factor, each ``[S, n]``.

        The first says for each row of the factor which row of ``[I; C]`` it is, the second is its
        inverse: pivots first, then the others in ascending order. Kept after the first use.
        """
        if self._order is None:
            assert self.pivots is not None
            left_size = self._left.shape[1] + self.rank
            right_size = self._right.shape[2] + self.rank
            size = left_size if self.side == "U" else right_size
            pivots = self.pivots.long()
            stored, rank = pivots.shape
            taken = torch.zeros(stored, size, dtype=torch.long, device=pivots.device)
            taken = taken.scatter(1, pivots, 1)
            source = rank - 1 + (1 - taken).cumsum(1)
            ranks = torch.arange(rank, device=pivots.device).expand(stored, rank)
            source = source.scatter(1, pivots, ranks)
            every = torch.arange(size, device=pivots.device).expand(stored, size)
            self._order = source, torch.empty_like(source).scatter(1, source, every)
        return self._order


def _stack(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts).to(like.dtype).contiguous()
