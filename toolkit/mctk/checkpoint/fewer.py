"""A model directory with fewer experts: which tensors shrink, and what config.json says then.

What transformers loads without us must be what it would have saved itself: the source's own names
and layout, fused or an expert at a time, and its config.json with only the numbers of experts
changed. What is found here is held against a skeleton of the smaller model (`check_fewer`), shape
by shape, before anything is written.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UserError, brief
from ..models import BankSite, RouterSite, build, is_of_other_sense, renumbered
from ..runtime import is_count_name
from ..terms import Bank, Term, compact, removed_members
from .source import Source, TensorInfo
from .weights import WeightMap, map_weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

ONE_EXPERT = re.compile(r"^(.*experts)\.(\d+)(\..*)$")
"""A tensor of one expert: the path of the experts, its number, and what is behind that."""


@dataclass(frozen=True)
class Share:
    """How a source tensor depends on the experts of its layer.

    Attributes:
        name: The tensor's name.
        dim: The dimension that is one entry an expert; None for a tensor of one expert.
        expert: The one expert that it is of.
        of_experts: Whether it holds experts, and not the router's rows.
        experts: E, of a tensor with such a dimension; what it has behind them stays.
        table: Whether its entries are experts' numbers.
    """

    name: str
    dim: int | None = None
    expert: int | None = None
    of_experts: bool = False
    experts: int = 0
    table: bool = False

    def renamed(self, kept: Sequence[int]) -> str | None:
        """The tensor's name where only some experts are left, None if it is gone with its own."""
        if self.expert is None:
            return self.name
        if self.expert not in kept:
            return None
        match = ONE_EXPERT.match(self.name)
        assert match is not None
        return f"{match[1]}.{kept.index(self.expert)}{match[3]}"

    def rest(self, tensor: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
        """What stays of the tensor where only some experts are left."""
        import torch

        if self.table:
            return renumbered(tensor, kept)
        if self.dim is None:
            return tensor
        beyond = range(self.experts, tensor.shape[self.dim])
        return tensor.index_select(self.dim, torch.tensor([*kept, *beyond]))


def shares(
    source: Source, weights: WeightMap, names: Iterable[str], prefix: str, router: RouterSite
) -> dict[str, Share]:
    """Finds the source tensors of a layer that shrink or go when experts are removed.

    Args:
        source: The model directory.
        weights: Its weight map.
        names: The source tensors of the layer.
        prefix: The layer's path in the model, and a dot.
        router: What of the layer depends on the number of experts.

    Raises:
        UserError: A tensor's layout is not known.
    """
    found: dict[str, Share] = {}
    inside = f"{prefix}{router.module}."
    for name in names:
        shape = source.tensors[name].shape
        targets = weights.targets[name]
        if any(is_of_other_sense(t.removeprefix(prefix)) for t in targets) and any(
            t.startswith(inside) for t in targets
        ):
            raise UserError(
                f"experts for text cannot be removed from this checkpoint: {name} and others "
                "number them through with experts for images; other methods can compress them"
            )
        for target in targets:
            if target.startswith(inside):
                first, _, more = target.removeprefix(inside).partition(".")
                if more and not first.isdigit():
                    continue  # of a module in the experts', a norm that all of them share
                found[name] = _of_experts(name, shape, router.experts)
            elif target.removeprefix(prefix) in router.tensors:
                path = target.removeprefix(prefix)
                dim = router.tensors[path]
                size = router.experts + router.extra.get(path, 0)
                if dim >= len(shape) or shape[dim] != size:
                    raise _unknown(name, shape, router.experts)
                found[name] = Share(name, dim=dim, experts=router.experts)
            elif target.removeprefix(prefix) in router.tables:
                found[name] = Share(name, table=True)
    return found


def _of_experts(name: str, shape: tuple[int, ...], experts: int) -> Share:
    match = ONE_EXPERT.match(name)
    if match is not None:
        return Share(name, expert=int(match[2]), of_experts=True)
    if not shape or shape[0] != experts:
        raise _unknown(name, shape, experts)
    return Share(name, dim=0, of_experts=True, experts=experts)


def _unknown(name: str, shape: tuple[int, ...], experts: int) -> UserError:
    return UserError(
        f"experts cannot be removed from this checkpoint: {name} has shape {list(shape)}, and "
        f"which part of it is of which of the {experts} experts is not known"
    )


def without_experts(
    config: Mapping[str, Any], full: Mapping[str, Any], experts: int, kept: int
) -> Iterator[dict[str, Any]]:
    """Yields config.json as it may be with fewer experts, the most likely first.

    Candidates are all keys called after a number of experts whose value is that number; mostly that
    is one key. Where it takes some of several, `check_fewer` tells which.

    Args:
        config: The source's config.json.
        full: The same with all that it leaves at its default.
        experts: E.
        kept: How many stay in every layer.
    """
    places = list(_places(config, experts)) or list(_places(full, experts))
    for count in range(len(places), 0, -1):
        for chosen in itertools.combinations(places, count):
            changed = copy.deepcopy(dict(config))
            for place in chosen:
                inner: Any = changed
                for key in place[:-1]:
                    inner = inner.setdefault(key, {})
                old = inner.get(place[-1])
                inner[place[-1]] = [kept] * len(old) if isinstance(old, list) else kept
            yield changed


def _places(config: Mapping[Any, Any], experts: int) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Mapping):
            yield from ((key, *rest) for rest in _places(value, experts))
        values = value if isinstance(value, list) and value else [value]
        if is_count_name(key) and all(type(v) is int and v == experts for v in values):
            yield (key,)


def check_fewer(
    source: Source,
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    layers: Iterable[Mapping[str, Share]],
    experts: int,
    kept: int,
) -> dict[str, Any]:
    """Finds the config.json of the model with fewer experts, and checks every tensor against it.

    Args:
        source: The original.
        config: Its configuration, as transformers reads it.
        dtype: The compute dtype.
        trust_remote_code: Whether its code may run.
        layers: Per layer, the tensors that depend on the number of experts.
        experts: E.
        kept: How many stay in every layer.

    Returns:
        The config.json.

    Raises:
        UserError: No change of it gives the shapes that the files would have.
    """
    numbers = range(kept)
    every = {name: share for layer in layers for name, share in layer.items()}
    left = {}
    for name, info in source.tensors.items():
        share = every.get(name, Share(name))
        new = share.renamed(numbers)
        if new is not None:
            left[new] = fewer(info, share, kept)
    shrunk = source.pretended(left, source.config)
    reason = "it has no key with that number"
    for changed in without_experts(source.config, config.to_dict(), experts, kept):
        # Files have infinity as an object, which `from_pretrained` turns back into a number.
        smaller = type(config).from_dict(type(config)._decode_special_floats(changed))
        smaller._name_or_path = config._name_or_path
        try:
            map_weights(build(smaller, dtype, trust_remote_code), shrunk)
        except (UserError, CheckpointError) as error:
            reason = brief(error)
            continue
        return changed
    raise UserError(
        f"{source.path / 'config.json'}: cannot say {kept} instead of {experts} experts: {reason}"
    )


def fewer(info: TensorInfo, share: Share, kept: int) -> TensorInfo:
    """What a header says of a tensor once so many experts are left."""
    if share.dim is None:
        return info
    shape = list(info.shape)
    shape[share.dim] += kept - share.experts
    return replace(info, shape=tuple(shape))


def compacted(
    sites: Mapping[str, BankSite], terms: Mapping[str, Sequence[Term]]
) -> tuple[dict[str, list[Term]], int | None]:
    """A layer's terms as they are stored: the banks of removed experts without them.

    Args:
        sites: The layer's banks.
        terms: Terms by bank; of experts all banks or none. They may be compact already.

    Returns:
        The terms, and how many experts are left if some were removed, else None.
    """
    found = {name: list(held) for name, held in terms.items()}
    experts = [name for name in found if sites[name].part != "linear"]
    banks = {}
    for name in experts:
        shape = found[name][0].shape if found[name] else sites[name].shape
        if shape.members != sites[name].shape.members:
            return found, shape.members
        banks[name] = Bank(name, -1, shape, found[name])
    gone = removed_members(banks.values())
    if not gone:
        return found, None
    kept = [e for e in range(sites[experts[0]].shape.members) if e not in gone]
    return found | {name: compact(bank, kept).terms for name, bank in banks.items()}, len(kept)
