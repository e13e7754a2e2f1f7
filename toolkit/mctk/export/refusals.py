"""What an export cannot say, which is refused, and what it loses, which is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..checkpoint import Source
from ..errors import UserError
from ..models import bank_sites
from ..report.tables import ranges
from ..runtime import TermModule
from ..terms import Bias, DynamicDense, ExpertSkip, Term, packed_bits

if TYPE_CHECKING:
    from torch import nn


def check_format(source: Source) -> None:
    """Checks that a checkpoint is of our format and that its layers agree with its config.json.

    Raises:
        UserError: It is not, or there is nothing to multiply out.
    """
    where = source.path / "config.json"
    quantization = source.config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise UserError(
            f"{where}: not a checkpoint in mctk's format: it holds no terms and loads without mctk "
            "as it is (originals do, and results of which only experts were removed)"
        )
    if quantization.get("quant_method") != "mctk":
        raise UserError(
            f"{where}: quantised by {quantization.get('quant_method')!r}, not made by mctk"
        )
    experts = quantization.get("experts") or {}
    if experts:
        counts = [f"{layer}: {entry['count']}" for layer, entry in experts.items()]
        more = f" and {len(counts) - 4} more" if len(counts) > 4 else ""
        raise UserError(
            f"{source.path}: its layers keep different numbers of experts "
            f"({', '.join(counts[:4])}{more}), which no config.json of the original architecture "
            "can say. Give every layer the same number (allocate: {method: uniform}) or serve it "
            "in mctk's format"
        )


def check_biases(mine: nn.Module, original: nn.Module, layer: int, constants: bool) -> None:
    """A constant needs a place: a bias of the original module, or a substitution of its expert.

    Args:
        mine: A layer of the compressed model.
        original: The same layer of the original architecture.
        layer: Its number.
        constants: Whether constants of down become substitutions.

    Raises:
        UserError: There is none; names the bank and what to do instead.
    """
    has_bias = {name: site.bias for name, site in bank_sites(original).items()}
    for name, site in bank_sites(mine).items():
        module = mine.get_submodule(site.module)
        held = has_bias[name] or (constants and site.part == "down")
        if not isinstance(module, TermModule) or held:
            continue
        if any(isinstance(term, Bias) for term in module.terms(site.part)):
            what = "experts that are constants (prune: mone)" if site.part == "down" else "biases"
            instead = "export it with --expert-substitution, or " if site.part == "down" else ""
            raise UserError(
                f"layer {layer}: {name} holds {what}, and the original's architecture has no bias "
                f"there to hold them, so this model cannot be multiplied out; {instead}serve it in "
                "mctk's format"
            )


def notes_of_layer(layer: nn.Module, index: int) -> list[tuple[str, int]]:
    """What a layer's terms lose or become, each with the layer's number."""
    found = []
    for module in layer.modules():
        if not isinstance(module, TermModule):
            continue
        for part in module.shapes:
            for term in module.terms(part):
                found += [(note, index) for note in _notes_of(term)]
    return list(dict.fromkeys(found))


def _notes_of(term: Term) -> Iterator[str]:
    if isinstance(term, DynamicDense) and term.drop:
        yield (
            "bases of which a forward skips channels: the dense form computes all channels, as the "
            "model does with dynamic pruning switched off"
        )
    if isinstance(term, ExpertSkip) and term.ratios:
        yield "experts that are skipped at run time: the dense form computes all that are chosen"
    if packed_bits(term):
        yield "packed weights: multiplied out, they take their full bits again"
    stored = {slot for slot in term.slots if slot is not None}
    if not isinstance(term, ExpertSkip) and len(stored) < sum(s is not None for s in term.slots):
        yield "matrices that experts share: the dense form holds a copy for each expert"


def merged(notes: Iterable[tuple[str, int]], layers: int) -> list[str]:
    """Each note once, with the layers that it is of."""
    by_note: dict[str, list[int]] = {}
    for note, layer in notes:
        by_note.setdefault(note, []).append(layer)
    return [
        note if len(found) == layers else f"{note} (layers {ranges(found)})"
        for note, found in by_note.items()
    ]


def skips(module: TermModule) -> bool:
    """Whether a module skips channels or experts at run time."""
    return any(
        (isinstance(term, DynamicDense) and bool(term.drop))
        or (isinstance(term, ExpertSkip) and bool(term.ratios))
        for part in module.shapes
        for term in module.terms(part)
    )
