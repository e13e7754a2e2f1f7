"""Experts that are modules in an `nn.ModuleList`: how remote code of 2024 holds them.

Such a block routes by itself and calls its experts one by one, so there is no forward of ours to
listen in: hooks on the experts tell what passes, and a hook on the router whose tokens they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UserError
from ..terms import Bank, DynamicDense, Term
from .dynamic import ColumnNorms, Skips, active_channels, is_enabled
from .list_layout import ACTIVATION, NAMES, linears, list_layout
from .owner import TermModule
from .rows import Rows
from .shared import Forward, SharedPath
from .skipping import skip_policy

LIST_OBSERVER = "_mctk_list_observer"
# A list does not know the block that holds it; whoever finds both says so (`join`).
_BLOCKS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()
_FOLLOWED: weakref.WeakKeyDictionary[nn.Module, Routing] = weakref.WeakKeyDictionary()


def is_expert_list(module: nn.Module) -> bool:
    """Whether a module is a list of experts, original or compressed."""
    if isinstance(module, TermExpertList):
        return True
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 0
        and all(linears(expert) is not None for expert in module)
    )


def join(block: nn.Module, module: nn.Module) -> None:
    """Says which Mixture-of-Experts block a list of experts belongs to."""
    _BLOCKS[module] = weakref.ref(block)


def follow(block: nn.Module, module: nn.Module) -> None:
    """Says which block a list belongs to; dynamic terms will hear of that block's routing."""
    join(block, module)
    if isinstance(module, TermExpertList) and module.dynamic is not None:
        routing = _FOLLOWED[module] = Routing(module)
        routing.listen(contextlib.ExitStack())


def observed_forward(module: nn.Module) -> nn.Module:
    """The module in whose forward all experts of a token run: of a list, the block around it."""
    if not is_expert_list(module):
        return module
    block = _BLOCKS[module]() if module in _BLOCKS else None
    if block is None:
        raise ValueError("a list of experts whose block nobody named; call bank_sites before")
    return block


class TermExpertList(TermModule):
    """Stands for a list of experts: their gate, up and down banks are sums of terms.

    It owns the tensors of all experts. Indexing and iterating, as the block's own code does, gives
    callables that run one expert by a call of this module, so that hooks on it (accelerate's, which
    bring offloaded tensors back) do their work. An expert that no term of down serves gives zeros.

    Base and deltas are computed for each call, as the block calls experts one by one; so are merged
    experts, whose routing weights only the block's own code knows how to add up. Dynamic terms
    skip the same channels as in `TermExperts`, chosen once in a forward of the block.

    Args:
        original: The list that it replaces, on any device; it may be a `TermExpertList`.
        specs: "gate", "up", "down" → the specs of the terms.

    Attributes:
        active_channels: As in `TermExperts`.

    Raises:
        CheckpointError: The specs do not fit the original, or that is no list of gated MLPs.
    """

    def __init__(
        self, original: nn.Module, specs: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        if isinstance(original, TermExpertList):
            shapes, activation = original.shapes, original.act_fn
            dtype = original.dtype or torch.float32
        elif isinstance(original, nn.ModuleList) and is_expert_list(original):
            try:
                shapes, _ = list_layout(original)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            activation = getattr(original[0], ACTIVATION)
            dtype = next(original.parameters()).dtype
        else:
            raise CheckpointError(f"{type(original).__name__} is not a list of experts")
        super().__init__(shapes, specs, dtype)
        if skip_policy(self._templates) is not None:
            raise CheckpointError("terms.down: the block's own code calls experts: none is skipped")
        self.act_fn: Any = activation
        self._path = SharedPath(self._templates, norm=False)
        self._norms = ColumnNorms()
        self._mctk_dynamic = True
        self.active_channels: dict[int, Tensor] | None = None
        if original in _BLOCKS:
            _BLOCKS[self] = _BLOCKS[original]

    @property
    def dynamic(self) -> int | None:
        """The place in down of the term that decides what is skipped, None without any."""
        return self._path.dynamic

    def set_terms(self, part: str, terms: Sequence[Term]) -> None:
        """See `TermModule.set_terms`."""
        super().set_terms(part, terms)
        self._norms.clear()

    def forward(self, x: Tensor, number: int) -> Tensor:
        """Runs one expert: ``x [..., H]`` to ``[..., H]``."""
        banks = {part: self.bank(part) for part in NAMES}
        dtype = next((t.dtype for bank in banks.values() for t in bank.terms), x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        skips: Skips | None = None
        probe = order = None
        if self.dynamic is not None and is_enabled(self):
            skips, probe, order = self._skips(banks, dtype, number, rows)
        else:
            self.active_channels = None

        def apply(part: str, rows: Tensor) -> Tensor:
            if skips is None:
                return banks[part].apply(rows, number)
            return skips.apply(banks[part], rows, number, None if part == "down" else probe)

        entering = (rows if order is None else rows[order]).to(dtype)
        h = self.act_fn(apply("gate", entering)) * apply("up", entering)
        y = apply("down", h)
        if order is not None:  # back to the block's own order
            place = torch.empty_like(order)
            place[order] = torch.arange(order.numel(), device=order.device)
            h, y = h[place], y[place]
        observer = getattr(self, LIST_OBSERVER, None)
        if observer is not None:
            observer(number, x, h, y)
        return y.reshape(x.shape)

    def _skips(
        self, banks: Mapping[str, Bank], dtype: torch.dtype, number: int, x: Tensor
    ) -> tuple[Skips, Tensor, Tensor | None]:
        """What is skipped in this forward of the block, made up at its first call of an expert.

        Returns:
            It, which of the expert's rows belong to the probe, in ascending order of tokens, and
            the order of x's rows that fits (None if they are in order).
        """
        routing = _FOLLOWED.get(self)
        if routing is None:
            raise ValueError("dynamic terms in a list of experts whose block nobody named")
        *_, order = routing.rows_of(number, x)
        if routing.choice is None:
            assert routing.hidden is not None and routing.index is not None
            assert routing.weights is not None and self.dynamic is not None
            once = Forward(
                self._path,
                banks,
                routing.hidden.to(dtype),
                routing.index,
                routing.weights,
                len(self),
                activate=self._activate,
                norm=None,
                norms=self._norms,
                skipping=True,
            )
            skips = once.choose()
            term = banks["down"].terms[self.dynamic]
            assert skips is not None and isinstance(term, DynamicDense)
            own = Rows(routing.index, len(self))
            routing.choice = skips, skips.by_expert(own)
            self.active_channels = active_channels(term, skips.dropped)
        skips, probes = routing.choice
        return skips, probes[number], order

    def _activate(self, wide: Tensor) -> Tensor:
        """The inputs of down, [n, I], from gate and up, [n, 2I]."""
        gate, up = wide.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def __len__(self) -> int:
        return self.shapes["down"].members

    def __getitem__(self, number: int) -> Callable[[Tensor], Tensor]:
        if not isinstance(number, int):
            raise TypeError(f"experts are numbered by integers, not {type(number).__name__}")
        if not -len(self) <= number < len(self):
            raise IndexError(f"expert {number} of {len(self)}")
        return _Expert(self, number % len(self))

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (self[number] for number in range(len(self)))


class _Expert:
    """One expert of a `TermExpertList`, as the block's code calls it."""

    def __init__(self, experts: TermExpertList, number: int) -> None:
        self.experts, self.number = experts, number

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts(x, self.number)


class Routing:
    """What a block's router chose in the forward that is under way.

    The router is whichever child of the block gives indices ``[T, k]`` and weights ``[T, k]``.

    Args:
        module: The list of experts.
        chosen: Is told the number of tokens and of (token, expert) pairs of each forward.
    """

    def __init__(self, module: nn.Module, chosen: Callable[[int, int], None] | None = None) -> None:
        # Held weakly: the hooks of a list that was replaced must not keep its terms alive.
        self._module = weakref.ref(module)
        self._block = weakref.ref(observed_forward(module))
        self.chosen = chosen
        self.choice: tuple[Skips, dict[int, Tensor]] | None = None
        self.hidden: Tensor | None = None
        self.index: Tensor | None = None
        self.weights: Tensor | None = None

    def listen(self, stack: contextlib.ExitStack) -> None:
        """Hooks the block and its children; undone with the stack, or once the list is replaced."""
        module, block = self._module(), self._block()
        assert block is not None

        def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._forget()
            if all(child is not self._module() for child in block.children()):
                stack.close()
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            self.hidden = hidden.reshape(-1, hidden.shape[-1])

        stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(self._forget).remove)
        for child in block.children():
            if child is not module:
                stack.callback(child.register_forward_hook(self._see).remove)

    def _forget(self, *_: Any) -> None:
        self.hidden = self.index = self.weights = self.choice = None

    def _see(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, tuple | list) or len(output) < 2:
            return
        index, weights = output[0], output[1]
        if not isinstance(index, Tensor) or not isinstance(weights, Tensor):
            return
        whole = not index.is_floating_point() and weights.is_floating_point()
        if index.dim() == 2 and index.shape == weights.shape and whole:
            self.index, self.weights = index, weights.detach()
            if self.chosen is not None:
                self.chosen(index.shape[0], index.numel())

    def rows_of(self, number: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Whose rows an expert got, in ascending order of tokens.

        Args:
            number: The expert's number.
            x: Its inputs, ``[n, H]``, in the block's own order.

        Returns:
            Tokens, slots and routing weights, ``[n]`` each, and the order of x's rows that fits
            them (None if it is as it should be).
        """
        name = type(self._block()).__name__
        if self.hidden is None or self.index is None or self.weights is None:
            raise UserError(
                f"{name}: its router does not hand out the chosen experts and their weights "
                "([tokens, k] each); such a block cannot be observed yet"
            )
        token, slot = (self.index == number).nonzero(as_tuple=True)
        expected = self.hidden[token]
        if expected.shape != x.shape:
            raise UserError(
                f"{name}: expert {number} got {x.shape[0]} rows where the router sent "
                f"{expected.shape[0]}; such a block cannot be observed yet"
            )
        order = None
        if not torch.equal(expected, x):
            # Blocks sort tokens by expert, and the order within an expert is the sort's. Equal
            # rows may swap places: to a router equal rows are equal.
            order = torch.empty_like(token)
            order[_keys(expected).argsort()] = _keys(x).argsort()
            if not torch.equal(expected, x[order]):
                raise UserError(
                    f"{name}: expert {number} got other rows than the block's own; such a block "
                    "cannot be observed yet"
                )
        return token, slot, self.weights[token, slot], order


def _keys(rows: Tensor) -> Tensor:
    """A number for each row ``[n, H]``, equal for equal rows and hardly ever else."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = rows.detach().contiguous().view(integer).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=generator)
    return (bits * factors.to(bits.device)).sum(-1)
