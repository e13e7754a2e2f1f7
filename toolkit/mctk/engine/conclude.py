"""The end of a run: evaluation, metrics.json, report and model card."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..evaluate import LogitStore, compare, evaluate_model
from ..evaluate.loading import text_stamps, versions
from ..files import write_json, write_text
from ..hookspecs import SPEC
from ..models import auto_class_name
from ..planning import (
    TOLERANCE,
    at_most,
    byte_warnings,
    coarse_warning,
    quantised_record,
    uniform,
    unread_record,
    unread_warnings,
)
from ..recipe import placed
from ..registry import OWN
from ..report import render_card, render_report
from .compress import Run, size_from_record
from .environment import environment, packages
from .memory import peak_device_bytes, peak_process_bytes
from .progress import Reporter
from .shards import experts_kept

if TYPE_CHECKING:
    from ..checkpoint import Source
    from ..planning import Plan
    from ..recipe import Evaluate, Recipe
    from ..registry import Registry

# Whose parameters or bytes a budget is a share of.
OWNER = {"model": "the model's", "experts": "the experts'", "targets": "the targeted banks'"}


def conclude(
    run: Run,
    directory: Path,
    fingerprint: str,
    reporter: Reporter,
    started: float,
    command: Sequence[str] | None,
    registry: Registry,
) -> dict[str, Any]:
    """Evaluates, reports, and writes metrics.json; a finished run is taken up as it is."""
    path = run.output / "metrics.json"
    section = run.plan.recipe.evaluate
    asked = section.model_dump(mode="json") if section else None
    if path.exists() and run.workspace.manifest.get("evaluated", "") == asked:
        reporter.say(f"{run.output} is finished already")
        return json.loads(path.read_text())
    evaluation = _evaluate(run, directory, fingerprint, reporter) if section else {}
    metrics = _metrics(run, evaluation, started, command)
    for columns in registry.call("table_columns", run=run):
        metrics["columns"] |= columns
    write_reports(run.output, metrics)
    run.workspace.manifest["evaluated"] = asked
    run.workspace.save()
    return metrics


def write_reports(directory: Path, metrics: dict[str, Any]) -> None:
    """Writes metrics.json, the report and the model card."""
    write_json(directory / "metrics.json", metrics)
    write_text(directory / "report.md", render_report(metrics))
    write_text(directory / "README.md", render_card(metrics))


def _evaluate(run: Run, directory: Path, fingerprint: str, reporter: Reporter) -> dict[str, Any]:
    """The original's figures, measured before compression began, and the result's beside them."""
    recipe = run.plan.recipe
    assert recipe.evaluate is not None
    known = original_path(run.plan, recipe.evaluate, directory, fingerprint)
    found: dict[str, Any] = {"original": evaluate_original(run, directory, fingerprint, reporter)}
    with reporter.phase("evaluate compressed", 1):
        settings = evaluation_settings(run.plan)
        found["compressed"] = evaluate_model(
            run.output,
            recipe.evaluate,
            report=reporter.progress,
            against=logits_of(known) if recipe.evaluate.divergence is not None else None,
            **settings,
        )
    found["paired"] = compare(found["original"], found["compressed"], recipe.seed)
    return found


def evaluation_settings(plan: Plan) -> dict[str, Any]:
    """How the original and what came of it are evaluated alike."""
    return {
        "device": str(plan.model.device),
        "dtype": str(plan.model.dtype).removeprefix("torch."),
        "trust_remote_code": plan.recipe.trust_remote_code,
    }


def original_path(plan: Plan, section: Evaluate, directory: Path, fingerprint: str) -> Path:
    """Where the cache keeps the original's figures, by all that they depend on."""
    asked = section.model_dump(mode="json")
    settings = evaluation_settings(plan)
    parts = [fingerprint, asked, settings, versions(), text_stamps(section.perplexity)]
    if plan.source.commit is not None:  # a hub model's tokenizer may have changed alone
        parts.append(plan.source.commit)
    key = json.dumps(parts, sort_keys=True)
    return directory / "evaluations" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def logits_of(known: Path) -> Path:
    """Where the original's logits lie beside its figures."""
    return known.with_suffix(".logits")


def known_original(known: Path, section: Evaluate) -> dict[str, Any] | None:
    """The original's figures, if they have been taken, and its logits, if they are asked for."""
    if section.divergence is not None and not LogitStore(logits_of(known)).complete:
        return None
    if not known.exists():
        return None
    found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    return found


def evaluate_original(
    run: Run, directory: Path, fingerprint: str, reporter: Reporter
) -> dict[str, Any]:
    """The original's figures, from the cache where they are known."""
    section = run.plan.recipe.evaluate
    assert section is not None
    known = original_path(run.plan, section, directory, fingerprint)
    found = known_original(known, section)
    if found is not None:
        return found
    known.parent.mkdir(parents=True, exist_ok=True)
    with reporter.phase("evaluate original", 1), placed(run.plan.recipe):
        found = evaluate_model(
            run.plan.source.path,
            section,
            report=reporter.progress,
            keep=logits_of(known) if section.divergence is not None else None,
            **evaluation_settings(run.plan),
        )
    write_json(known, found)
    return found


def _metrics(
    run: Run,
    evaluation: dict[str, Any],
    started: float,
    command: Sequence[str] | None,
) -> dict[str, Any]:
    """What metrics.json holds."""
    plan, manifest = run.plan, run.workspace.manifest
    recipe, model = plan.recipe, plan.model
    changed = plan.layout(run.sizes or size_from_record(manifest["sizes"]))
    kind = manifest.get("output_kind", "mctk")
    left = experts_kept(manifest["layers"])
    said = uniform(plan, left)
    planned = None if changed is None else plan.count(changed)
    layers = [
        {"layer": int(index), **{k: v for k, v in record.items() if k not in ("modules", "sha256")}}
        for index, record in sorted(manifest["layers"].items(), key=lambda item: int(item[0]))
    ]
    warnings = [
        *plan.warnings,
        *unread_warnings(plan, said),
        *byte_warnings(plan, manifest["attained"]["bytes"]),
    ]
    budget = None
    if plan.allowed is not None and recipe.budget is not None:
        attained = plan.attained(manifest["attained"], left)
        short = (plan.allowed - attained) / plan.scope
        way = "keep" if recipe.budget.keep is not None else "remove"
        share = recipe.budget.keep or recipe.budget.remove or 0.0
        scope = f"{OWNER[recipe.budget.of]} {recipe.budget.unit}"
        budget = {
            "requested": f"{way} {100 * share:g}% of {scope}",
            "of": recipe.budget.of,
            "unit": recipe.budget.unit,
            "original": plan.scope,
            "allowed": plan.allowed,
            "attained": attained,
            "shortfall_fraction": short,
            "coarse": short > TOLERANCE,
        }
        warnings += coarse_warning(plan, attained)
    warnings += _token_warnings(layers)
    calibration = None
    if recipe.calibration is not None:
        c = recipe.calibration
        calibration = {
            "digest": manifest["identity"]["calibration"],
            "sequences": c.sequences,
            "length": c.length,
            "tokens": c.sequences * c.length,
            "propagate": recipe.propagate,
            "sources": manifest["sources"],
        }
    return {
        "mctk_version": versions().get("mctk"),
        "versions": {**_libraries(), **packages(), "platform": sys.platform, **_plugins(recipe)},
        "environment": environment(model),
        "command": shlex.join(command) if command else None,
        "recipe": recipe.canonical(),
        "recipe_text": recipe.published(),
        "model": {
            "name": recipe.model_name,
            "model_type": model.config.model_type,
            "auto_class": auto_class_name(model.config),
            "path": str(plan.source.path),
            **hub_record(plan.source),
            "license": license_of(plan.source.path),
        },
        "output_kind": kind,
        "quantised_source": quantised_record(plan),
        "unread": unread_record(plan, said),
        "calibration": calibration,
        "sizes": {
            "original": plan.original.as_dict(),
            "planned": planned.as_dict() if planned else None,
            "at_most": [] if changed is None else at_most(changed),
            "attained": manifest["attained"],
        },
        "budget": budget,
        "layers": layers,
        "gate": manifest["gate"],
        "evaluation": evaluation or None,
        "statistics": manifest.get("statistics"),
        "seconds": {**manifest.get("seconds", {}), "total": time.perf_counter() - started},
        "peak_memory_bytes": peak_process_bytes(),
        "peak_device_memory_bytes": peak_device_bytes(str(model.device)),
        "columns": {},
        "warnings": warnings,
    }


def hub_record(source: Source) -> dict[str, str | None]:
    """What is known of a model's place on the hub; all of it None for a directory."""
    origin = source.origin
    if origin is None:
        return {"hub": None, "revision": None, "commit": None}
    return {"hub": origin.name, "revision": origin.revision, "commit": origin.commit}


def license_of(path: Path) -> str | None:
    """The licence that the model's own card states, carried over to the result's."""
    card = path / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None  # the card is for people; a broken one says nothing of the licence
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _libraries() -> dict[str, str]:
    """Versions of what the numbers depend on besides mctk's own."""
    return {name: version for name, version in versions().items() if name != "mctk"}


def _plugins(recipe: Recipe) -> dict[str, str]:
    """The version of the hook specifications, and the plugins at work that are not mctk's own."""
    methods = [step.method for step in recipe.steps]
    methods += [recipe.allocate.method] if recipe.allocate is not None else []
    origins = [method.origin for method in methods if method.origin is not None]
    foreign = {o.distribution: o.version for o in origins if o.distribution not in ("", OWN)}
    return {"hook specifications": str(SPEC), **foreign}


def _token_warnings(layers: list[dict[str, Any]]) -> list[str]:
    """Experts that calibration hardly reached: their statistics rest on few tokens."""
    unseen = [
        f"layer {layer['layer']} expert {expert}"
        for layer in layers
        for expert, tokens in enumerate(layer.get("tokens_per_expert") or [])
        if tokens == 0
    ]
    if not unseen:
        return []
    more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
    return [
        f"no calibration token reached {', '.join(unseen[:3])}{more}: what is known of them rests "
        "on nothing; calibrate on more text (calibration.sequences), or on text of other kinds"
    ]
