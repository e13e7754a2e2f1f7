"""Dynamic pruning: which channels of a base a forward skips (see `terms.DynamicDense`).

For each slot of the base, of its stored channels those with the least score are skipped:
``score_j = (1 - m) · share of the frozen energy + m · share of the energy in this call``, m = 0.5.
Both energies are means over tokens of ``(Σ_e g_e h_ej)² · ‖W_b[:, j]‖²``, the square of equation 9
of D²-MoE (arXiv 2502.17298), over the slot's members e that a token visits; each is divided by its
sum over the channels, so that neither outweighs the other when the tokens at hand are larger or
smaller than those of the calibration. The frozen one comes from calibration and never changes. The
other comes from a probe: of the call's tokens that visit the slot, the half with the largest norm
(at least two), for which gate and up are computed on all channels.

So the result is deterministic for a batch, and depends on what is in the batch: a token's output
may differ with its neighbours. The deltas keep all channels; only the base is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..terms import Bank, DynamicDense, PackedTensor, Term
from .rows import Pairs, Rows

_MIX = 0.5  # m: the weight of this call's tokens
_LEAST = 2  # tokens of a probe
_ENABLED = "_mctk_dynamic"


class dynamic_pruning:
    """Switches dynamic pruning in a model on or off; as a context, until its end.

    That is the skipping of channels, and that of experts (`mctk.runtime.skipping`).

    Args:
        model: A model, or a module of one. Its terms decide how much is skipped.
        enabled: Whether channels and experts are skipped. They are unless this was called.
    """

    def __init__(self, model: nn.Module, enabled: bool) -> None:
        self._before = [(m, is_enabled(m)) for m in model.modules() if hasattr(m, _ENABLED)]
        for module, _ in self._before:
            setattr(module, _ENABLED, enabled)

    def __enter__(self) -> None:
        """Does nothing: the switch is set already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Switches back."""
        for module, before in self._before:
            setattr(module, _ENABLED, before)


def is_enabled(module: nn.Module) -> bool:
    """Whether a module skips channels."""
    return bool(getattr(module, _ENABLED, False))


def dynamic_index(terms: Mapping[str, Sequence[Term]]) -> int | None:
    """Returns the place in down of the term that decides what is skipped, None without any.

    Raises:
        CheckpointError: There are more than one, or gate's and up's do not go with it.
    """
    found = {
        part: [i for i, term in enumerate(bank) if isinstance(term, DynamicDense) and term.drop]
        for part, bank in terms.items()
    }
    leaders = found["down"]
    if len(leaders) > 1:
        raise CheckpointError(f"terms.down[{leaders[1]}]: a second dynamic term")
    for part, indices in found.items():
        for i in indices:
            term, where = terms[part][i], f"terms.{part}[{i}]"
            assert isinstance(term, DynamicDense)
            axis = "cols" if part == "down" else "rows"
            if term.axis != axis:
                raise CheckpointError(f"{where}.axis: must be '{axis}', not '{term.axis}'")
            if not leaders:
                raise CheckpointError(f"{where}: follows a dynamic term of down, there is none")
            if term.slots != terms["down"][leaders[0]].slots:
                raise CheckpointError(f"{where}.slots: differ from those of terms.down")
    return leaders[0] if leaders else None


@dataclass
class Skips:
    """What one forward skips.

    Attributes:
        pairs: The pairs of tokens and slots.
        probe: Which of the pairs were computed on all channels, ``[P]``.
        dropped: For each slot in use which of the I channels are skipped, ``[I]``; empty while
            the probe runs.
    """

    pairs: Pairs
    probe: Tensor
    dropped: dict[int, Tensor]

    def of_rows(self, rows: Rows) -> Tensor:
        """Which rows belong to the probe, ``[n]``."""
        return self.pairs.to_rows(self.probe[:, None].float(), rows)[:, 0] > 0

    def by_expert(self, rows: Rows) -> dict[int, Tensor]:
        """For each expert which of its rows belong to the probe."""
        probed = self.of_rows(rows)
        return {s.expert: probed[s.start : s.stop] for s in rows.segments}

    def shared(self, term: DynamicDense, x: Tensor) -> Tensor:
        """A dynamic term of gate or up on the probe's pairs; on the others once there is a choice.

        Args:
            term: The term.
            x: The tokens, ``[T, H]``.

        Returns:
            ``[P, I]``, zero where a pair belongs to the other phase.
        """
        out = x.new_zeros(self.pairs.count, term.shape.out_features)
        live = ~self.probe if self.dropped else self.probe
        for segment in self.pairs.segments:
            chosen = live[segment.start : segment.stop].nonzero()[:, 0] + segment.start
            inputs = x.index_select(0, self.pairs.token[chosen])
            if self.dropped:
                slot = term.slots[segment.expert]
                assert slot is not None
                part = term.without(inputs, segment.expert, self.dropped[slot])
            else:
                part = term.apply(inputs, segment.expert)
            out = out.index_copy(0, chosen, part)
        return out

    def apply(self, bank: Bank, x: Tensor, member: int, probe: Tensor | None) -> Tensor:
        """`Bank.apply` of one expert, with what is skipped; for what is computed by expert.

        Args:
            bank: Gate, up or down.
            x: The expert's rows, ``[n, in]``.
            member: The expert.
            probe: Which of the rows belong to the probe, ``[n]``; not needed for down.
        """
        total = x.new_zeros(x.shape[0], bank.shape.out_features)
        for term in bank.terms:
            if not term.has(member):
                continue
            slot = term.slots[member]
            if isinstance(term, DynamicDense) and term.drop and slot is not None:
                part = term.without(x, member, self.dropped[slot])
                if probe is not None:
                    part = torch.where(probe[:, None], term.apply(x, member), part)
            else:
                part = term.apply(x, member)
            total = total + part
        return total


def probe_of(pairs: Pairs, x: Tensor) -> Tensor:
    """Returns which pairs belong to the probe, ``[P]``: of each slot's the half of largest norm."""
    norms = torch.linalg.vector_norm(x.float(), dim=1)[pairs.token]
    probe = torch.zeros(pairs.count, dtype=torch.bool, device=x.device)
    for segment in pairs.segments:
        size = segment.stop - segment.start
        order = torch.argsort(norms[segment.start : segment.stop], descending=True, stable=True)
        probe[order[: min(size, max(_LEAST, size // 2))] + segment.start] = True
    return probe


def choose(term: DynamicDense, skips: Skips, z: Tensor, norms: ColumnNorms) -> dict[int, Tensor]:
    """Returns for each slot which channels to skip, ``[I]``.

    Args:
        term: The dynamic term of down.
        skips: The probe.
        z: The pairs' ``Σ_e g_e h_e``, ``[P, I]``; the probe's rows are looked at.
        norms: Of the term's columns.
    """
    assert term.energy is not None
    dropped = {}
    for segment in skips.pairs.segments:
        slot = term.slots[segment.expert]
        assert slot is not None
        channels = _channels(term, slot)
        probed = z[segment.start : segment.stop][skips.probe[segment.start : segment.stop]]
        seen = probed.float().square().mean(0)[channels] * norms(term, slot)
        score = (1 - _MIX) * _shares(term.energy[slot].float()) + _MIX * _shares(seen)
        least = torch.argsort(score, stable=True)[: term.drop]
        mask = torch.zeros(term.shape.in_features, dtype=torch.bool, device=z.device)
        mask[channels[least]] = True
        dropped[slot] = mask
    return dropped


def active_channels(term: DynamicDense, dropped: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Returns for each slot the channels of its base that stay in a forward, ascending."""
    kept = {}
    for slot, mask in dropped.items():
        channels = _channels(term, slot)
        kept[slot] = channels[~mask[channels]].sort().values
    return kept


def _channels(term: DynamicDense, slot: int) -> Tensor:
    """The stored channels of a slot, in the order of the columns, ``[C]``."""
    if term.cols is None:
        return torch.arange(term.shape.in_features, device=term.device)
    return (term.cols if term.cols.dim() == 1 else term.cols[slot]).long()


def _shares(energy: Tensor) -> Tensor:
    return energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)


class ColumnNorms:
    """Squared norms of the columns of a dynamic base, kept until its weights change."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[object, ...], Tensor]] = {}

    def clear(self) -> None:
        """Forgets them: for weights that other weights have replaced in the same place."""
        self._known.clear()

    def __call__(self, term: DynamicDense, slot: int) -> Tensor:
        """Returns ``‖W_b[:, j]‖²`` of a slot, ``[C]`` float32."""
        weight = term.weight
        held = weight.parts().values() if isinstance(weight, PackedTensor) else [weight]
        state = tuple(
            (t.data_ptr(), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in held
        )
        known = self._known.get(slot)
        if known is None or known[0] != state:
            norms = weight[slot].detach().float().square().sum(0)
            known = self._known[slot] = (state, norms)
        return known[1]
