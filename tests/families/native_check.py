"""Native results of a family: experts removed, and loaded where there is no mctk.

Every family is treated alike: REAP and a random choice take an expert away, of each of the router's
groups where it has some, in every layer that has experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from mctk.checkpoint import Source, experts_per_token
from mctk.engine import run
from mctk.errors import UserError
from mctk.models import find_router
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from mctk.sweep import StreamedModel, stream_logits
from safetensors.torch import save_file
from transformers import AutoConfig

from .loading import FRESH, FreshProcess
from .models import head_for, token_ids

WORKS = "works"
METHODS = ("reap", "random")


def check_native(name: str, directory: Path) -> str:
    """Removes experts from a family's tiny model; the results must load without mctk.

    Args:
        name: The family's model type.
        directory: Where results go. The model and the text lie beside it, as `check.save` puts
            them.

    Returns:
        "works", or the exact reason.
    """
    model, text = directory.parent / "model", directory.parent / "text.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        keep = experts_to_keep(model)
        results = _results(model, text, directory, keep)
    except UserError as error:
        return str(error)
    head = head_for(AutoConfig.from_pretrained(model, trust_remote_code=True)).__name__
    said: dict[str, list[str]] = {}  # reason → methods
    for method, found in zip(METHODS, results, strict=True):
        if isinstance(found, UserError):
            reason = str(found)
        elif isinstance(found, Exception):
            lines = str(found).strip().splitlines() or [""]
            reason = f"{type(found).__name__}: {lines[0]}"
        else:
            reason = _wrong_files(found, model, directory / method, keep)
            reason = reason or _wrong_logits(directory / method, head)
        if reason:
            said.setdefault(reason, []).append(method)
    if len(said) == 1 and len(next(iter(said.values()))) == len(METHODS):
        return next(iter(said))
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in said.items()) or WORKS


def experts_to_keep(model: Path) -> int:
    """One expert less than there are, or one less of each of the router's groups.

    Raises:
        UserError: No layer has experts, or none can go.
    """
    streamed = StreamedModel(Source(model), trust_remote_code=True)
    routers = [find_router(layer) for layer in streamed.layers]
    router = next((router for router in routers if router is not None), None)
    if router is None:
        raise UserError("no layer has experts")
    keep = router.experts - router.groups
    if keep < experts_per_token(streamed.config):
        raise UserError(f"a token uses all but {router.groups - 1} of {router.experts} experts")
    return keep


def _results(model: Path, text: Path, directory: Path, keep: int) -> list[Any]:
    """Metrics of both methods' runs, or the errors that ended them."""
    registry = load_plugins()
    recipes = []
    for method in METHODS:
        recipe = {
            "model": str(model),
            "output": str(directory / method),
            "calibration": {"text": str(text), "sequences": 4, "length": 32, "batch": 4},
            "dtype": "float32",
            "trust_remote_code": True,
            "gate": True,
            "steps": [{"prune": method, "targets": "experts.*", "size": {"rank": keep}}],
        }
        path = directory / f"{method}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        recipes.append(load_recipe(path, registry=registry))
    cache = directory.parent / "cache"
    return run(recipes, registry, cache=cache, keep_going=True, fresh_process=False)


def _wrong_files(metrics: dict[str, Any], model: Path, output: Path, keep: int) -> str | None:
    """What a result's record and config.json say that they should not; None if all is well."""
    if metrics["output_kind"] != "native":
        return f"the result is of kind {metrics['output_kind']}"
    if metrics["sizes"]["planned"] != metrics["sizes"]["attained"]:
        return f"not of the planned size: {metrics['sizes']}"
    before, after = (json.loads((path / "config.json").read_text()) for path in (model, output))
    changed = set(_changes(before, after))
    if list(before) != list(after) or not changed or {number for _, number in changed} != {keep}:
        return f"config.json was to say {keep} experts and nothing else, and says {changed}"
    return None


def _changes(before: Any, after: Any, path: str = "") -> list[tuple[str, Any]]:
    """Where two JSON values differ, and what stands there afterwards."""
    if isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after):
        return [c for key in before for c in _changes(before[key], after[key], f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [c for i, (old, new) in pairs for c in _changes(old, new, f"{path}.{i}")]
    return (
        [] if before == after else [(path, json.dumps(after) if type(after) is not int else after)]
    )


def _wrong_logits(path: Path, head: str) -> str | None:
    """Why a process without mctk does not get the logits that mctk streams; None if it does."""
    ids = token_ids()
    model = StreamedModel(Source(path), trust_remote_code=True)
    [logits] = stream_logits(model, ids, ids.shape[0])
    expected = path.parent / f"{path.name}-expected.safetensors"
    save_file({"ids": ids, "logits": logits.contiguous()}, expected)
    # Remote code of old may not import without mctk, whatever its checkpoint.
    process = FRESH if "auto_map" in model.source.config else PLAIN
    found = process.ask({"path": str(path), "head": head, "expected": str(expected)})
    words = {"fresh": "plain transformers", "again": "saved again by plain transformers"}
    wrong = [f"{words[key]}: {said}" for key, said in found.items() if said != WORKS]
    return "; ".join(wrong) or None


PLAIN = FreshProcess("plain.py")
"""One process without mctk for all families that this one checks."""
