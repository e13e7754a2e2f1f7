"""The experts of a Mixture-of-Experts block, original or compressed: one loop for both.

The loop goes over the experts that tokens were routed to. It is the reference that faster paths
are held against, and it is where statistics listen (`observe`). Its sums depend on no order: each
weighted output has its own place ``[token, slot]``, and places are summed at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..terms import Bank, BankShape, DynamicDense, Term
from .dynamic import ColumnNorms, Skips, active_channels, is_enabled
from .gradients import observed_product
from .names import check_implementation
from .owner import TermModule
from .rows import Rows
from .shared import Forward, SharedPath
from .skipping import skip_policy, without_policy

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate", "has_post_expert_norm")
_OBSERVER = "_mctk_observer"


class Observer(Protocol):
    """Is told of every expert that a forward runs.

    Args:
        expert: Its number.
        token_index: Rows of the hidden states, ``[n]``, in ascending order.
        slot_index: Which of the token's k choices it was, ``[n]``.
        x: The expert's inputs, ``[n, H]``.
        h: Its activated intermediate values, ``[n, I]`` (the inputs of down).
        y: Its outputs before routing weights, ``[n, H]``.
        weights: The routing weights, ``[n]``.
    """

    def __call__(
        self,
        expert: int,
        token_index: Tensor,
        slot_index: Tensor,
        x: Tensor,
        h: Tensor,
        y: Tensor,
        weights: Tensor,
        /,
    ) -> None:
        """See the class."""


@contextlib.contextmanager
def observe(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Tells `observer` of every expert that an experts module runs, while the context is open.

    Raises:
        ValueError: The module would not run by our loop: an original module of a model whose
            experts implementation is another one.
    """
    if not isinstance(module, TermExperts):
        check_implementation(module)
    before = getattr(module, _OBSERVER, None)
    setattr(module, _OBSERVER, observer)
    try:
        yield
    finally:
        setattr(module, _OBSERVER, before)


# An expert's number and inputs [n, H] → its activated values [n, I] and outputs [n, H].
_Expert = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def _run(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    expert: _Expert,
    kept: Tensor | None = None,
) -> Tensor:
    """Runs the routed experts (of the choices that are kept); [T, H] in, [T, H] out."""
    tokens, k = top_k_index.shape
    observer: Observer | None = getattr(module, _OBSERVER, None)
    rows = Rows(top_k_index, experts, kept=kept)
    # As transformers: products with the routing weights, and their sum, in the wider type.
    dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
    outputs = hidden_states.new_zeros(tokens * k, hidden_states.shape[-1], dtype=dtype)
    for segment in rows.segments:
        place = rows.places[segment.start : segment.stop]
        token, slot = place // k, place % k
        x = hidden_states[token]
        h, y = expert(segment.expert, x)
        weights = top_k_weights[token, slot]
        outputs[place] = (y * weights[:, None]).to(dtype)
        if observer is not None:
            observer(segment.expert, token, slot, x, h, y, weights)
    return outputs.view(tokens, k, hidden_states.shape[-1]).sum(dim=1).to(hidden_states.dtype)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Runs an original experts module of transformers by our loop; registered as "mctk".

    Args:
        module: An experts module with transformers' flags; they say how its tensors are laid out.
        hidden_states: ``[T, H]``.
        top_k_index: Chosen experts, ``[T, k]``.
        top_k_weights: Routing weights, ``[T, k]``.

    Returns:
        The weighted sum of the experts' outputs, ``[T, H]``.
    """
    wide = "gate_up_proj" if module.has_gate else "up_proj"
    experts = module.down_proj.shape[0]
    observed = observed_product(module, top_k_index, experts)

    def project(name: str, number: int, x: Tensor) -> Tensor:
        weight = getattr(module, name)[number]
        x = x.to(weight.dtype)
        if observed is not None:
            out = observed(name, number, x, weight)
        else:
            out = x @ weight if module.is_transposed else F.linear(x, weight)
        return out + getattr(module, f"{name}_bias")[number] if module.has_bias else out

    def expert(number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        fused = project(wide, number, x)
        h = module._apply_gate(fused) if module.has_gate else module.act_fn(fused)
        y = project("down_proj", number, h)
        return h, module.post_expert_norm(y) if module.has_post_expert_norm else y

    return _run(module, hidden_states, top_k_index, top_k_weights, experts, expert)


class TermExperts(TermModule):
    """Stands for an experts module: its gate, up and down banks are sums of terms.

    It takes over everything of the original but its weights: flags, configuration, activation,
    limits, norms. An expert that no term of down serves is dropped: it contributes nothing.
    What experts share is computed once per token, and merged experts are one: see
    `mctk.runtime.shared`. A skip term says which choices are not computed at all
    (`mctk.runtime.skipping`).

    Args:
        original: The module that it replaces, on any device; it may be a `TermExperts`.
        specs: "gate" (if it has one), "up", "down" → the specs of the terms.

    Attributes:
        active_channels: After a forward that skipped channels of a dynamic base: for each slot
            those that it used, ascending. None after any other.

    Raises:
        CheckpointError: The specs do not fit the original, or that is laid out in no known way.
    """

    def __init__(
        self, original: nn.Module, specs: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> None:
        shapes, dtype = _layout(original)
        super().__init__(shapes, specs, dtype)
        # Set here, so that it is not taken over from another module of terms.
        self._policy = skip_policy(self._templates)
        computed = {part: without_policy(terms) for part, terms in self._templates.items()}
        self._path = SharedPath(computed, original.has_post_expert_norm)
        self._norms = ColumnNorms()
        self._mctk_dynamic = True
        self.active_channels: dict[int, Tensor] | None = None
        self.original_class: type[nn.Module] = getattr(original, "original_class", type(original))
        for name, value in vars(original).items():
            if name not in self.__dict__ and name != _OBSERVER:
                setattr(self, name, value)
        for name, child in original.named_children():
            self.add_module(name, child)
        self.num_experts = shapes["down"].members
        down = self._templates["down"]
        self._served = [any(term.has(e) for term in down) for e in range(self.num_experts)]

    def set_terms(self, part: str, terms: Sequence[Term]) -> None:
        """See `TermModule.set_terms`."""
        super().set_terms(part, terms)
        self._norms.clear()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `experts_forward`.

        What experts share is computed once per token, unless an observer wants to see each
        expert's own outputs: then all goes through the plain loop.
        """
        banks = {part: self._computed(part) for part in self.shapes}
        kept: Tensor | None = None
        if self._policy is not None and is_enabled(self):
            top_k_weights, kept = self._policy.skip(top_k_weights)
        dtype = next((t.dtype for bank in banks.values() for t in bank.terms), hidden_states.dtype)
        observed = getattr(self, _OBSERVER, None) is not None
        once: Forward | None = None
        skips: Skips | None = None
        skipping = self._path.dynamic is not None and is_enabled(self)
        if top_k_index.numel() and (skipping or (self._path.shares and not observed)):
            once = Forward(
                self._path,
                banks,
                hidden_states.to(dtype),
                top_k_index,
                top_k_weights,
                self.num_experts,
                activate=self._activate,
                norm=self.post_expert_norm if self.has_post_expert_norm else None,
                norms=self._norms,
                skipping=skipping,
                kept=kept,
            )
            if not observed:
                out = once.run()
                self._note(banks, once.skips)
                return out.to(hidden_states.dtype)
            skips = once.choose()
        self._note(banks, skips)
        probes: dict[int, Tensor] = {}
        if skips is not None:  # of every expert's own rows, merged or not
            probes = skips.by_expert(Rows(top_k_index, self.num_experts, kept=kept))

        def expert(number: int, x: Tensor) -> tuple[Tensor, Tensor]:
            def apply(part: str, rows: Tensor) -> Tensor:
                if skips is None:
                    return banks[part].apply(rows, number)
                probe = None if part == "down" else probes[number]
                return skips.apply(banks[part], rows, number, probe)

            x = x.to(dtype)
            wide = [apply(part, x) for part in banks if part != "down"]
            h = self._activate(torch.cat(wide, dim=-1))
            y = apply("down", h)
            if self.has_post_expert_norm and self._served[number]:
                y = self.post_expert_norm(y)
            return h, y

        return _run(self, hidden_states, top_k_index, top_k_weights, self.num_experts, expert, kept)

    def _computed(self, part: str) -> Bank:
        """A part's bank without the policy, which computes nothing."""
        bank = self.bank(part)
        return dataclasses.replace(bank, terms=without_policy(bank.terms))

    def _note(self, banks: Mapping[str, Bank], skips: Skips | None) -> None:
        """Keeps which channels of the base the forward uses, where some are skipped."""
        self.active_channels = None
        if skips is not None and self._path.dynamic is not None:
            term = banks["down"].terms[self._path.dynamic]
            assert isinstance(term, DynamicDense)
            self.active_channels = active_channels(term, skips.dropped)

    def _activate(self, wide: Tensor) -> Tensor:
        """The inputs of down, [n, I], from gate and up, [n, 2I], as its original class does."""
        if not self.has_gate:
            return self.act_fn(wide)
        if not self.is_concatenated:
            wide = wide.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        # Families override `_apply_gate`, and it reads attributes of the module: ours has them.
        return self.original_class._apply_gate(self, wide)


def gate_up_rows(module: nn.Module, part: str, width: int) -> slice:
    """Which outputs of an experts module's fused gate and up are those of a part.

    Args:
        module: An original module with a gate; its flags say how the two lie.
        part: "gate" or "up".
        width: I, the outputs of each.
    """
    first = part == "gate"
    if not module.is_concatenated:
        return slice(0 if first else 1, None, 2)
    return slice(0, width) if first else slice(width, None)


def _layout(original: nn.Module) -> tuple[dict[str, BankShape], torch.dtype]:
    """The shapes of an experts module's banks, and its dtype; refuses what it does not know."""
    name = type(original).__name__
    if isinstance(original, TermExperts):
        return original.shapes, original.dtype or torch.float32
    missing = [flag for flag in FLAGS if not hasattr(original, flag)]
    if missing:
        raise CheckpointError(f"{name} is not an experts module: it has no {missing[0]}")
    known = {*WEIGHTS, *(f"{weight}_bias" for weight in WEIGHTS)}
    for key, _ in [
        *original.named_parameters(recurse=False),
        *original.named_buffers(recurse=False),
    ]:
        if key not in known:
            raise CheckpointError(f"{name} holds {key}: a layout that mctk does not know")
    wide = original.gate_up_proj if original.has_gate else original.up_proj
    down = original.down_proj
    if original.is_transposed:
        wide, down = wide.transpose(1, 2), down.transpose(1, 2)
    experts, hidden, intermediate = down.shape
    if tuple(wide.shape) != (experts, intermediate * (1 + original.has_gate), hidden):
        raise CheckpointError(
            f"{name} holds {list(wide.shape)} beside down {list(down.shape)}: a layout that its "
            "flags do not describe"
        )
    up = BankShape(experts, intermediate, hidden)
    gate = {"gate": up} if original.has_gate else {}
    return {**gate, "up": up, "down": BankShape(experts, hidden, intermediate)}, down.dtype
