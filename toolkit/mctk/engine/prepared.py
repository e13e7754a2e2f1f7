"""What a run's prepared steps made of each layer, kept on disk between the sweeps.

The result of a merge by Fisher information has to be kept, because what it was made from is not: a
layer's squared gradients live for that layer only. Kept are terms; but a residual, E matrices that
are the original's less what the other terms give, bit by bit, is written down as such and computed
again, so that a base a layer is all that lies on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from ..runtime import meta_tensors
from ..statistics import StatisticsCache
from ..statistics.cache import CHECKSUM, checksum
from ..terms import Bank, Dense, Term

if TYPE_CHECKING:
    from ..planning import Plan

Banks = dict[str, Bank]
_LOGGER = logging.getLogger(__name__)


class PreparedStore:
    """The prepared layers of one run, in the statistics cache: runs with the same steps share them.

    Args:
        plan: The run's plan; it has prepared steps.
        cache: The calibration's statistics.
    """

    def __init__(self, plan: Plan, cache: StatisticsCache) -> None:
        self.plan = plan
        self.directory = cache.directory.parent / "prepared"
        steps = plan.recipe.canonical()["steps"][: plan.prepared]
        self.steps = {"steps": steps, "seed": plan.recipe.seed}
        self.context = cache.context
        # Sizes count only where a step's result depends on them: then budgets cannot share it.
        sizes = plan.sizes()
        self._sizes = {
            layer: {
                f"{number}.{bank}": sizes[number, layer, bank]
                for number in range(plan.prepared)
                if plan.reads_size(number, layer, sizes)
                for bank in plan.targets[number].get(layer, [])
            }
            for layer in self.layers()
        }
        self._known: dict[int, Path] = {}

    def identity(self, layer: int) -> dict[str, Any]:
        """All that a prepared layer depends on, besides model and calibration, as JSON."""
        return {**self.steps, "layer": layer, "sizes": self._sizes[layer]}

    def path(self, layer: int) -> Path:
        """Where a prepared layer lies or would lie."""
        if layer not in self._known:
            text = json.dumps([self.context, self.identity(layer)], sort_keys=True)
            key = hashlib.sha256(text.encode()).hexdigest()
            self._known[layer] = self.directory / key[:2] / f"{key}.safetensors"
        return self._known[layer]

    def layers(self) -> list[int]:
        """The layers that prepared steps work on."""
        targets = self.plan.targets[: self.plan.prepared]
        return sorted({layer for step in targets for layer in step})

    def has(self, layer: int) -> bool:
        """Whether a layer is there and whole; one that is cut off is thrown away.

        Only the header is read: contents are checked when they are (`get`).
        """
        path = self.path(layer)
        if not path.exists():
            return False
        try:
            with safe_open(str(path), framework="pt", backend="pread") as file:
                if CHECKSUM in (file.metadata() or {}):
                    return True
        except (OSError, SafetensorError) as error:
            _LOGGER.warning("%s is damaged and will be made anew: %s", path, error)
        path.unlink(missing_ok=True)
        return False

    def put(
        self,
        layer: int,
        original: Banks,
        now: Banks,
        rewritten: set[str],
        notes: list[dict[str, str]],
    ) -> None:
        """Stores a layer.

        Args:
            layer: Its number.
            original: Its original banks.
            now: All its banks after the prepared steps.
            rewritten: Which of them those steps rewrote.
            notes: What the steps said about their work.
        """
        tensors: dict[str, torch.Tensor] = {}
        described: dict[str, list[dict[str, Any]]] = {}
        for name in sorted(rewritten):
            entries = described.setdefault(name, [])
            residual = find_residual(now[name], original[name])
            for i, term in enumerate(now[name].terms):
                entries.append({"spec": term.spec(), "residual": term is residual})
                if term is not residual:
                    tensors |= {f"{name}.{i}.{key}": t for key, t in term.stored().items()}
        kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        path = self.path(layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "banks": json.dumps(described),
            "notes": json.dumps(notes),
            CHECKSUM: checksum(kept),
        }
        write_tensors(path, kept, metadata)

    def get(self, layer: int, original: Banks) -> tuple[Banks, set[str]]:
        """A layer's banks after the prepared steps, and the names of those that were rewritten.

        Args:
            layer: Its number.
            original: Its original banks, from which residuals are computed.
        """
        described, tensors = _read(self.path(layer))
        now = dict(original)
        for name, entries in described.items():
            bank = original[name]
            device = bank.terms[0].device
            terms: list[Term | None] = []
            for i, entry in enumerate(entries):
                own = {
                    key: tensors[f"{name}.{i}.{key}"].to(device)
                    for key in ([] if entry["residual"] else entry["spec"]["tensors"])
                }
                terms.append(None if entry["residual"] else Term.from_spec(entry["spec"], own))
            others = [term for term in terms if term is not None]
            whole = [make_residual(bank, others) if term is None else term for term in terms]
            now[name] = replace(bank, terms=whole)
        return now, set(described)

    def notes(self, layer: int) -> list[dict[str, str]]:
        """What the steps said about their work on a layer."""
        with safe_open(str(self.path(layer)), framework="pt") as file:
            found: list[dict[str, str]] = json.loads(file.metadata().get("notes", "[]"))
        return found

    def in_place(self, layer: int) -> bool:
        """Whether each expert's neurons are where they were: every bank holds a residual."""
        with safe_open(str(self.path(layer)), framework="pt") as file:
            described = json.loads(file.metadata()["banks"])
        return all(any(e["residual"] for e in entries) for entries in described.values())

    def meta(self, layer: int) -> dict[str, list[Term]]:
        """The rewritten banks' terms without their data."""
        with safe_open(str(self.path(layer)), framework="pt") as file:
            described = json.loads(file.metadata()["banks"])
        return {
            name: [Term.from_spec(e["spec"], meta_tensors(e["spec"])) for e in entries]
            for name, entries in described.items()
        }


def _read(path: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt", backend="pread") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get(CHECKSUM) != checksum(tensors):
        raise ValueError(f"{path}: its checksum is wrong")
    return json.loads(metadata["banks"]), tensors


def find_residual(bank: Bank, original: Bank) -> Term | None:
    """The term that holds, for each member, the original's matrix less all other terms; or None.

    Equal means bit by bit, in float32.
    """
    slots = tuple(range(bank.shape.members))
    for term in bank.terms:
        if not isinstance(term, Dense) or term.slots != slots or term.dtype != torch.float32:
            continue
        if term.rows is not None or term.cols is not None or term.unpacked() is not term:
            continue
        others = [other for other in bank.terms if other is not term]
        parts = zip(slots, _residuals(original, others), strict=True)
        if all(torch.equal(term.weight[slot], part) for slot, part in parts):
            return term
    return None


def make_residual(original: Bank, others: list[Term]) -> Dense:
    """The term that `find_residual` found, from the original's matrices and the other terms."""
    shape = original.shape
    weight = torch.empty(
        shape.members, shape.out_features, shape.in_features, device=original.terms[0].device
    )
    for slot, part in enumerate(_residuals(original, others)):
        weight[slot] = part
    return Dense(shape, range(shape.members), weight)


def _residuals(original: Bank, others: list[Term]) -> Any:
    """Yields for each member the original's matrix [out, in] less the others', in float32."""
    rest = Bank(original.name, original.layer, original.shape, others).without_biases()
    for member in range(original.shape.members):
        exact = original.materialise(member)[0]
        part = rest.materialise(member)[0]
        assert exact is not None
        yield exact.float() if part is None else exact.float() - part.float()


def on_meta(banks: Mapping[str, Bank]) -> Banks:
    """Banks without data, as hooks of plans get them."""
    return {
        name: replace(bank, terms=[term.to(device="meta") for term in bank.terms])
        for name, bank in banks.items()
    }
