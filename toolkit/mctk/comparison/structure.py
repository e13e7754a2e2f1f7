"""What figures show of the original itself: routing by text, experts' similarity, their spectra.

One sweep over a few thousand tokens of every text, a layer in memory at a time; kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import evaluation_windows
from ..evaluate.loading import load_tokenizer
from ..files import write_json
from ..models import read_banks
from ..runtime import observe, run_expert
from ..sweep import ForwardSweep, LayerVisit
from .similarity import GRID, bank_spectra, cka_tokens, linear_cka

if TYPE_CHECKING:
    from ..data import TokenWindows
    from ..engine.progress import Reporter
    from ..models import BankSite
    from ..planning import Plan

VERSION = 1  # raised whenever the figures change
TOKENS = 4096  # of each text
CALIBRATION = "calibration"


def structure(
    plan: Plan,
    calibration: TokenWindows | None,
    directory: Path,
    fingerprint: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Looks at the model that a comparison starts from.

    Args:
        plan: Of any of its runs: model, texts to evaluate on, device.
        calibration: What the methods saw; None where nothing is calibrated.
        directory: The cache.
        fingerprint: Of the model's files.
        reporter: Progress.

    Returns:
        JSON: "layers" (with experts), "experts" (of each), "routing" (text → "tokens" and "shares"
        [layer][expert]), "similarity" ("layers", "tokens", "cka" [layer][expert][expert]) and
        "spectra" ("grid", "banks": bank → a line a layer, see `similarity.bank_spectra`). A model
        without experts has empty lists; a figure that is not finite is None.
    """
    texts = _texts(plan, calibration)
    digests = {name: hashlib.sha256(_raw(ids)).hexdigest() for name, ids in texts.items()}
    where = (str(plan.model.dtype), plan.model.device.type)
    key = json.dumps([VERSION, GRID, fingerprint, digests, *where], sort_keys=True)
    known = directory / "structures" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if known.exists():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return found
    found = _look(plan, texts, reporter)
    known.parent.mkdir(parents=True, exist_ok=True)
    write_json(known, found)
    return found


def _raw(ids: torch.Tensor) -> bytes:
    return f"{tuple(ids.shape)}\0".encode() + ids.cpu().numpy().astype("<i8").tobytes()


def _texts(plan: Plan, calibration: TokenWindows | None) -> dict[str, torch.Tensor]:
    """The first tokens of every text, all in windows of one length: name → ids [N, T]."""
    found: dict[str, torch.Tensor] = {}
    if calibration is not None:
        found[CALIBRATION] = calibration.ids
    section = plan.recipe.evaluate
    if section is not None and section.perplexity:
        tokenizer = load_tokenizer(plan.source.path, plan.recipe.trust_remote_code)
        for text in section.perplexity:
            limit = max(1, TOKENS // text.length)
            limit = min(limit, text.windows) if text.windows else limit
            ids = evaluation_windows(tokenizer, text, text.length, limit).ids
            found[f"{text.name} (held out)" if text.name == CALIBRATION else text.name] = ids
    length = min((ids.shape[1] for ids in found.values()), default=0)
    return {name: ids[: max(1, TOKENS // length), :length] for name, ids in found.items()}


def _look(plan: Plan, texts: Mapping[str, torch.Tensor], reporter: Reporter) -> dict[str, Any]:
    names = list(texts)
    found: dict[str, Any] = {
        "version": VERSION,
        "layers": [],
        "experts": [],
        "routing": {name: {"tokens": texts[name].numel(), "shares": []} for name in names},
        "similarity": {"layers": [], "tokens": 0, "cka": []},
        "spectra": {"grid": [i / (GRID - 1) for i in range(GRID)], "banks": {}},
    }
    if not names:
        return found
    ids = torch.cat(list(texts.values()))
    owner = torch.cat([torch.full((len(t),), i) for i, t in enumerate(texts.values())])
    section = plan.recipe.calibration
    sweep = ForwardSweep(plan.model, ids, section.batch if section else 1)

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        sites = plan.sites[layer.index]
        site = next((s for s in sites.values() if s.part == "down"), None)
        if site is None:
            outputs = [layer.run(b).cpu() for b in range(len(layer.inputs))]
        else:
            outputs = _look_at_layer(plan, layer, site, owner, names, found)
        reporter.step(f"layer {layer.index}")
        return outputs

    with reporter.phase("structure of the original", len(plan.model.layers)):
        sweep.run(visit)
    return found


def _look_at_layer(
    plan: Plan,
    layer: LayerVisit,
    site: BankSite,
    owner: torch.Tensor,
    names: list[str],
    found: dict[str, Any],
) -> list[torch.Tensor]:
    """Runs one layer on all batches and enters what its experts are like.

    Args:
        plan: The plan.
        layer: The layer, filled.
        site: Of its experts' down.
        owner: Number of the text that each window belongs to, [N].
        names: Of the texts.
        found: Where it goes.

    Returns:
        The layer's outputs, one a batch.
    """
    experts = site.shape.members
    module = layer.module.get_submodule(site.module)
    length = layer.inputs[0].shape[1]
    every = math.ceil(owner.numel() * length / cka_tokens(experts))
    counts = torch.zeros(len(names), experts, dtype=torch.int64)
    rows: dict[int, torch.Tensor] = {}  # number of a token → what enters the experts, [H]
    first = 0  # window of the batch

    def tap(
        expert: int,
        token: torch.Tensor,
        slot: torch.Tensor,
        x: torch.Tensor,
        h: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        place = token.cpu() + first * length
        counts[:, expert] += torch.bincount(owner[place // length], minlength=len(names))
        for i in (place % every == 0).nonzero()[:, 0].tolist():
            rows.setdefault(int(place[i]), x[i].detach().clone())

    outputs = []
    with observe(module, tap):
        for b in range(len(layer.inputs)):
            windows = layer.inputs[b].shape[0]
            outputs.append(layer.run(b).cpu())
            first += windows
            layer.inputs[b] = outputs[-1][:0]  # used: free it
    sample = torch.stack([rows[number] for number in sorted(rows)])
    with torch.no_grad():
        cka = linear_cka(lambda expert: run_expert(module, expert, sample), experts)
    found["layers"].append(layer.index)
    found["experts"].append(experts)
    for name, count in zip(names, counts, strict=True):
        shares = count.double() / count.sum().clamp(min=1)
        found["routing"][name]["shares"].append(shares.tolist())
    found["similarity"]["layers"].append(layer.index)
    found["similarity"]["tokens"] = len(sample)
    found["similarity"]["cka"].append(
        [[value if math.isfinite(value) else None for value in line] for line in cka.tolist()]
    )
    banks = read_banks(layer.module, layer.index)
    for name, other in plan.sites[layer.index].items():
        if other.module == site.module:
            line = bank_spectra(banks[name], counts.sum(0).tolist(), len(plan.model.layers))
            if line is not None:
                found["spectra"]["banks"].setdefault(name, []).append(line)
    return outputs
