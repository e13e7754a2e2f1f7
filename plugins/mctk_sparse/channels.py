"""Structured pruning inside experts: every expert loses its least intermediate channels.

A channel of an expert is a row of gate, a row of up and the column of down that it meets. Whole
channels leave, so the matrices that stay are really smaller. The energy is eq. 9 of D²-MoE (arXiv
2502.17298, section 3.4), squared, for one expert instead of a base; and CAMERA's (arXiv 2508.02322)
at α = 0 without routing weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from mctk import decompose
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.statistics import Need
    from mctk.terms import BankShape, Dense, Term
    from torch import Tensor

PARTS = ("gate", "up", "down")


class ChannelOptions(MethodOptions):
    """Options of `channels`."""

    score: Literal["energy", "magnitude"] = Field(
        default="energy",
        description="energy: what the channel adds to the expert's output on its own tokens; "
        "magnitude: the product of its row and column norms, without data",
    )
    channel_multiple: int = Field(
        default=8,
        ge=1,
        description="numbers of channels are multiples of it (fast kernels want 8 in bfloat16)",
    )


class Channels(Method):
    """Prunes intermediate channels of every expert; a size is the number that stay in each."""

    stage = "prune"
    name = "channels"
    scope = "experts"
    summary = "Prunes the intermediate channels that add least to each expert's output."
    reference = "arXiv 2502.17298, eq. 9; arXiv 2508.02322 (energy)"
    Options = ChannelOptions
    takes_size = True
    # Channels are scored one by one: what several do together is not in it.
    units = "score"

    def needs(self, shape: BankShape, bank: str, options: ChannelOptions) -> list[Need]:
        """What enters down, by channel, for each expert."""
        if bank != "experts.down" or options.score == "magnitude":
            return []
        return [_energy()]

    def sizes(self, banks: Layer, options: ChannelOptions) -> tuple[list[int], list[int]]:
        """Numbers of channels; each stores a row of gate and up and a column of down an expert."""
        from mctk.terms import DENSE

        found = _matrices(banks)
        channels = found["down"].weight.shape[2]
        counts = [*range(options.channel_multiple, channels, options.channel_multiple)]
        each = sum(dense.weight.numel() for dense in found.values()) // channels
        return [*counts, DENSE], [each * count for count in (*counts, channels)]

    def layout(self, banks: Layer, size: int | None, options: ChannelOptions) -> Terms:
        """Smaller matrices with the places of their channels."""
        import torch

        found = _matrices(banks)
        stored, _, channels = found["down"].weight.shape
        count = _count(channels, size)
        chosen = torch.empty(stored, count, dtype=torch.long, device="meta")
        return _cut(banks, found, chosen)

    def curve(self, banks: Layer, statistics: Any, options: ChannelOptions) -> list[float]:
        """The sum of the scores of the channels that go, at each size."""
        from mctk.terms import DENSE

        scores = _scores(banks, statistics, options)
        # From the smallest on, so that small sums keep their digits.
        tails = [0.0, *scores.double().sort(dim=1).values.cumsum(1).sum(0).tolist()]
        counts = self.sizes(banks, options)[0]
        return [0.0 if n == DENSE else tails[scores.shape[1] - n] for n in counts]

    def prune(
        self, layer: Layer, statistics: Any, size: int | None, options: ChannelOptions
    ) -> Terms:
        """Keeps the `size` channels of every expert with the highest scores, in their order."""
        scores = _scores(layer, statistics, options)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, : _count(scores.shape[1], size)].sort(dim=1).values
        return _cut(layer, _matrices(layer), chosen)


def _energy() -> Any:
    from mctk.statistics import ChannelEnergy

    return ChannelEnergy("experts.down", of="current")


def _matrices(banks: Layer) -> dict[str, Dense]:
    """Returns gate's (if there is one), up's and down's matrices, slot for slot the same experts.

    Raises:
        UserError: A bank holds anything else besides biases, or they do not go together.
    """
    from mctk.terms import Bias, Dense

    found: dict[str, Dense] = {}
    for name, bank in banks.items():
        part = name.rpartition(".")[2]
        place = f"{name} of layer {bank.layer}"
        terms = [term for term in bank.terms if not isinstance(term, Bias)]
        if len(terms) != 1 or type(terms[0]) is not Dense:
            kinds = " + ".join(term.kind for term in terms) or "nothing"
            raise UserError(
                f"{place} holds {kinds}: prune/channels takes channels from the experts' full "
                "matrices, before they are decomposed, merged with a base or pruned otherwise"
            )
        if terms[0].rows is not None or terms[0].cols is not None:
            raise UserError(f"{place} has lost channels before")
        found[part] = terms[0]
    place = f"layer {next(iter(banks.values())).layer}"
    if not {"up", "down"} <= set(found) <= set(PARTS):
        raise UserError(f"prune/channels in {place} cuts gate, up and down: target experts.*")
    if len({dense.slots for dense in found.values()}) > 1:
        raise UserError(f"the experts banks of {place} share their matrices differently")
    return found


def _count(channels: int, size: int | None) -> int:
    from mctk.terms import DENSE

    if size == DENSE:
        return channels
    if size is None or not 1 <= size <= channels:
        raise UserError(f"an expert of {channels} channels cannot keep {size}")
    return size


def _scores(banks: Layer, statistics: Any, options: ChannelOptions) -> Tensor:
    """Returns each slot's channel scores ``[S, I]``, float32, not negative.

    Energy: ``Σ_x h_j² · ‖W_down[:, j]‖²`` over the tokens of the slot's members, which is what the
    expert's squared output would lose if channels were uncorrelated (arXiv 2502.17298, eq. 9,
    squared). A slot that no token reached has no energies: its channels go by magnitude.
    """
    import torch

    found = _matrices(banks)
    norms = {
        part: torch.stack([_norms(dense.weight[s], part) for s in range(dense.weight.shape[0])])
        for part, dense in found.items()
    }
    magnitude = torch.stack(list(norms.values())).prod(0)
    if options.score == "magnitude":
        return magnitude
    energy = statistics[_energy()].float()
    groups = decompose.members_of_slots(found["down"])
    seen = torch.stack([energy[group].sum(0) for group in groups]).to(magnitude.device)
    scores = seen * norms["down"]
    unseen = ~(seen > 0).any(1)
    # Only their order matters: no token will miss them, as far as the calibration knows.
    tiny = magnitude * (1e-20 / magnitude.amax(1, keepdim=True).clamp(min=1e-20))
    return torch.where(unseen[:, None], tiny, scores)


def _norms(weight: Tensor, part: str) -> Tensor:
    """Squared norms of a matrix's channels, ``[I]``."""
    return weight.float().square().sum(0 if part == "down" else 1)


def _cut(banks: Layer, found: Mapping[str, Dense], chosen: Tensor) -> dict[str, list[Term]]:
    """The banks with the chosen channels ``[S, n]``, ascending; as they are if that is all."""
    from mctk.terms import Dense

    result: dict[str, list[Term]] = {}
    for name, bank in banks.items():
        part = name.rpartition(".")[2]
        dense = found[part]
        axis = 2 if part == "down" else 1
        if chosen.shape[1] == dense.weight.shape[axis]:
            result[name] = list(bank.terms)
            continue
        where = chosen.to(dense.device)
        index = where[:, None, :] if axis == 2 else where[:, :, None]
        sizes = [-1, -1, -1]
        sizes[3 - axis] = dense.weight.shape[3 - axis]
        weight = dense.weight.gather(axis, index.expand(*sizes))
        places = {"cols" if part == "down" else "rows": where.int()}
        cut = Dense(bank.shape, dense.slots, weight, **places)
        result[name] = [cut if term is dense else term for term in bank.terms]
    return result
