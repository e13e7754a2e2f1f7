"""Runs recipes: a set of runs over one model and one calibration; one run is a set of one."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..data import TokenWindows, calibration_windows
from ..errors import UserError
from ..evaluate import compare, evaluate_model
from ..evaluate.suite import load_tokenizer, resolve_device, versions
from ..files import write_json, write_text
from ..plan import TOLERANCE, Plan, count_model, make_plan
from ..report import render_card, render_report
from ..statistics import Need, StatisticsCache, cache_directory
from ..terms import Term
from .calibrate import cache_context, calibrate
from .compress import Run, Sample, compress, prepare_sample, size_from_record, size_record
from .curves import measure_curves
from .gate import check_fresh_process, check_sizes, check_streamed
from .memory import peak_device_bytes, peak_process_bytes
from .progress import Reporter
from .shards import copy_companions, write_config, write_index, write_outer
from .workspace import Workspace

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..registry import Registry

OWNER = {"model": "the model's", "experts": "the experts'", "targets": "the targeted banks'"}
PROBE_TOKENS = 64  # length of the gate's sequence where there is no calibration text


def run(
    recipes: Sequence[Recipe],
    registry: Registry,
    *,
    cache: str | Path | None = None,
    reporter: Reporter | None = None,
    command: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Runs recipes that share model, calibration and compute dtype.

    Args:
        recipes: The recipes; their layers are read once for all of them.
        registry: The plugins.
        cache: Directory of the statistics cache; see `cache_directory`.
        reporter: Progress; silent by default.
        command: The command line, for reports.

    Returns:
        Each run's metrics, as its metrics.json holds them.

    Raises:
        UserError: Whatever is wrong with recipes, model, text or output directories; nothing has
            been written over then.
    """
    reporter = reporter or Reporter(quiet=True)
    started = time.perf_counter()
    directory = cache_directory(cache)
    device = resolve_device(recipes[0].device)
    _check_set(recipes)
    plan = make_plan(recipes[0], registry, device)
    plans = [plan, *(make_plan(recipe, registry, device, plan.model) for recipe in recipes[1:])]
    windows = read_calibration(plan)
    fingerprint = plan.source.fingerprint(directory)
    identities = [_identity(p, fingerprint, windows) for p in plans]
    runs: list[Run] = []
    try:
        for p, identity in zip(plans, identities, strict=True):
            workspace = Workspace(p.recipe.output)
            workspace.open(identity)
            runs.append(Run(p, workspace))
            workspace.manifest["sources"] = sorted(set(windows.sources)) if windows else []
            reporter.add_log(workspace.output / "run.log")
        registry.hook.run_started(run=runs[0] if len(runs) == 1 else runs)
        todo = [r for r in runs if not r.workspace.manifest["finished"]]
        for r in todo:
            # First, so that a text or task that cannot be measured costs no hours of compression.
            if r.plan.recipe.evaluate is not None:
                _evaluate_original(r, directory, fingerprint, reporter)
        if todo:
            _compress_all(todo, windows, fingerprint, directory, registry, reporter)
        results = []
        for r in runs:
            results.append(_conclude(r, directory, fingerprint, reporter, started, command))
        return results
    finally:
        for r in runs:
            r.workspace.close()
        reporter.close()


def read_calibration(plan: Plan) -> TokenWindows | None:
    """The calibration's token windows; None if the recipe has none."""
    calibration = plan.recipe.calibration
    if calibration is None:
        return None
    tokenizer = load_tokenizer(plan.source.path, plan.recipe.trust_remote_code)
    return calibration_windows(
        tokenizer,
        calibration.source,
        calibration.sequences,
        calibration.length,
        plan.recipe.seed,
    )


def _check_set(recipes: Sequence[Recipe]) -> None:
    """Runs of one set must read the same model on the same text, and write to their own places."""
    first = recipes[0]
    outputs = {recipe.output.resolve() for recipe in recipes}
    if len(outputs) < len(recipes):
        raise UserError("output: two runs of one set have the same output directory")
    shared = ("model", "revision", "trust_remote_code", "dtype", "seed", "calibration")
    for recipe in recipes:
        for key in shared:
            if getattr(recipe, key) != getattr(first, key):
                raise recipe.error((key,), "differs between the runs of one set")
        if recipe.propagate == "compressed":
            raise recipe.error(
                ("calibration", "propagate"),
                "statistics of the compressed model's activations are not supported yet; "
                "write propagate: original",
            )


def _identity(plan: Plan, fingerprint: str, windows: TokenWindows | None) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.canonical(),
        "model": fingerprint,
        "calibration": windows.digest if windows else None,
    }


def _probe_ids(plan: Plan) -> torch.Tensor:
    """Seeded random tokens for the gate where no calibration text is given."""
    text = plan.model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", PROBE_TOKENS) or PROBE_TOKENS
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    length = min(PROBE_TOKENS, limit)
    return torch.randint(0, text.vocab_size, (1, length), generator=generator)


def _compress_all(
    runs: list[Run],
    windows: TokenWindows | None,
    fingerprint: str,
    directory: Path,
    registry: Registry,
    reporter: Reporter,
) -> None:
    """Everything up to the written and checked files."""
    plan = runs[0].plan
    model = plan.model
    cache: StatisticsCache | None = None
    sweeps = 0
    if windows is not None:
        batch = plan.recipe.calibration.batch if plan.recipe.calibration else 1
        context = cache_context(model, fingerprint, windows.digest, batch)
        cache = StatisticsCache(directory, context)
        needs = _union([r.plan for r in runs])
        state = runs[0].workspace.state
        sweeps = calibrate(model, windows.ids, batch, needs, plan.sites, cache, state, reporter)
    ids = windows.ids if windows is not None else _probe_ids(plan)
    sample = prepare_sample(model, ids)
    for r in runs:
        _decide_sizes(r, sample, cache, reporter)
        manifest = r.workspace.manifest
        manifest.setdefault("statistics", {"cache_hits": 0, "cache_misses": 0, "sweeps": 0})
        if cache is not None and not manifest["layers"]:
            manifest["statistics"] = {
                "cache_hits": cache.hits,
                "cache_misses": cache.misses,
                "sweeps": sweeps,
            }
        r.workspace.save()
    compress(model, runs, sample, cache, reporter)
    for r in runs:
        _finish_files(r, sample, reporter, registry)


def _union(plans: list[Plan]) -> dict[int, list[Need]]:
    needs: dict[int, list[Need]] = {}
    for plan in plans:
        for layer, wanted in plan.needs.items():
            known = needs.setdefault(layer, [])
            known += [need for need in wanted if need not in known]
    return needs


def _decide_sizes(
    run: Run, sample: Sample, cache: StatisticsCache | None, reporter: Reporter
) -> None:
    """Allocates, or takes up what an interrupted run had allocated; restates the plan."""
    manifest = run.workspace.manifest
    if manifest["sizes"] is not None:
        run.sizes = size_from_record(manifest["sizes"])
        return
    curves = None
    if run.plan.needs_curves:
        if cache is None:
            raise run.plan.recipe.error((), "calibration is missing; the allocator needs curves")
        path = run.workspace.state / "curves.json"
        curves = measure_curves(run.plan, run.plan.model, sample, cache, path, reporter)
    run.sizes = run.plan.solve(curves)
    manifest["sizes"] = size_record(run.sizes)
    write_json(run.workspace.state / "plan.json", restated(run))
    run.workspace.save()


def restated(run: Run) -> dict[str, Any]:
    """The plan with the actual sizes."""
    planned = run.plan.predict(run.sizes)
    return {
        "original": run.plan.original.as_dict(),
        "planned": planned.as_dict() if planned else None,
        "allowed": run.plan.allowed,
        "sizes": size_record(run.sizes),
    }


def _finish_files(run: Run, sample: Sample, reporter: Reporter, registry: Registry) -> None:
    """Outer shard, index, config, companions; then the gate."""
    plan, workspace, model = run.plan, run.workspace, run.plan.model
    layers = workspace.manifest["layers"]
    if workspace.outer() is None:
        workspace.add_outer(write_outer(plan, run.output))
    records = [layers[str(index)] for index in range(len(model.layers))]
    files = [workspace.manifest["outer"]["file"], *(record["file"] for record in records)]
    parameters, nbytes = write_index(run.output, files)
    modules = {path: spec for record in records for path, spec in record["modules"].items()}
    steps = [f"{s.stage}/{s.method.name} v{s.method.version}" for s in plan.recipe.steps]
    write_config(plan, run.output, modules, _providers(modules), steps)
    copy_companions(plan.source, run.output)
    write_text(run.output / "recipe.yaml", plan.recipe.yaml())
    changed = sum(record["new"] for record in records)
    total = changed + sum(record["copied"] for record in records)
    total += workspace.manifest["outer"]["copied"]
    if changed == 0:
        raise plan.recipe.error(
            ("budget",) if plan.recipe.budget else (),
            "0 tensors were changed: every bank was kept as it is; remove more",
        )
    gate: dict[str, Any] = {"tensors_changed": changed, "tensors_total": total}
    check_sizes(plan.predict(run.sizes), parameters, nbytes)
    gate["sizes_equal"] = True
    if plan.recipe.gate:
        with reporter.phase("gate", 2):
            assert run.hidden is not None
            expected = model.head(sample.ids, run.hidden.to(model.device)).cpu()
            gate |= check_streamed(run.output, model, sample.ids, expected)
            reporter.step("the files give the computed logits, bit by bit")
            fresh = check_fresh_process(run.output, workspace.state, model, sample.ids, expected)
            gate["fresh_process_equal"] = fresh
            reporter.step(
                "from_pretrained in a fresh process gives the same bits"
                if fresh
                else "from_pretrained was left out: the model does not fit into memory"
            )
    workspace.manifest["gate"] = gate
    workspace.manifest["attained"] = _attained(run, parameters, nbytes)
    workspace.manifest["finished"] = True
    workspace.manifest["seconds"] = {k: round(v, 3) for k, v in reporter.seconds.items()}
    workspace.save()
    for index in range(len(model.layers)):
        registry.hook.layer_done(run=run, layer=index)
    for path in workspace.state.glob("gate-*.safetensors"):
        path.unlink()


def _providers(modules: dict[str, Any]) -> list[str]:
    """Plugins whose kinds of term the checkpoint holds."""
    found: set[str] = set()
    for entry in modules.values():
        terms = entry["terms"]
        lists = terms.values() if isinstance(terms, dict) else [terms]
        found |= {spec["provider"] for specs in lists for spec in specs if "provider" in spec}
    return sorted(found)


def _attained(run: Run, parameters: int, nbytes: int) -> dict[str, int]:
    """The result's sizes: stored ones from the files, active ones from the terms in them."""
    changed = terms_of(run)
    sizes = count_model(run.plan.model, changed).as_dict()
    return {**sizes, "parameters": parameters, "bytes": nbytes}


def terms_of(run: Run) -> dict[int, dict[str, list[Term]]]:
    """The written terms, on meta, from the manifest's module specs."""
    changed: dict[int, dict[str, list[Term]]] = {}
    for index, sites in enumerate(run.plan.sites):
        modules = run.workspace.manifest["layers"][str(index)]["modules"]
        prefix = f"{run.plan.model.layers_path}.{index}."
        for name, site in sites.items():
            entry = modules.get(prefix + site.module)
            if entry is None:
                continue
            specs = entry["terms"] if site.part == "linear" else entry["terms"][site.part]
            changed.setdefault(index, {})[name] = [_meta_term(spec) for spec in specs]
    return changed


def _meta_term(spec: dict[str, Any]) -> Term:
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in spec["tensors"].items()
    }
    return Term.from_spec(spec, tensors)


def _conclude(
    run: Run,
    directory: Path,
    fingerprint: str,
    reporter: Reporter,
    started: float,
    command: Sequence[str] | None,
) -> dict[str, Any]:
    """Evaluates, reports, and writes metrics.json; a finished run is taken up as it is."""
    path = run.output / "metrics.json"
    section = run.plan.recipe.evaluate
    asked = section.model_dump(mode="json") if section else None
    if path.exists() and run.workspace.manifest.get("evaluated", "") == asked:
        reporter.say(f"{run.output} is finished already")
        return json.loads(path.read_text())
    evaluation = _evaluate(run, directory, fingerprint, reporter) if section else {}
    metrics = _metrics(run, evaluation, reporter, started, command)
    write_json(path, metrics)
    write_text(run.output / "report.md", render_report(metrics))
    write_text(run.output / "README.md", render_card(metrics))
    run.workspace.manifest["evaluated"] = asked
    run.workspace.save()
    return metrics


def _evaluate(run: Run, directory: Path, fingerprint: str, reporter: Reporter) -> dict[str, Any]:
    """The original's figures, measured before compression began, and the result's beside them."""
    recipe = run.plan.recipe
    assert recipe.evaluate is not None
    found: dict[str, Any] = {"original": _evaluate_original(run, directory, fingerprint, reporter)}
    with reporter.phase("evaluate compressed", 1):
        settings = _evaluation_settings(run)
        found["compressed"] = evaluate_model(run.output, recipe.evaluate, **settings)
        reporter.step("done")
    found["paired"] = compare(found["original"], found["compressed"], recipe.seed)
    return found


def _evaluation_settings(run: Run) -> dict[str, Any]:
    return {
        "device": str(run.plan.model.device),
        "dtype": str(run.plan.model.dtype).removeprefix("torch."),
        "trust_remote_code": run.plan.recipe.trust_remote_code,
    }


def _evaluate_original(
    run: Run, directory: Path, fingerprint: str, reporter: Reporter
) -> dict[str, Any]:
    """The original's figures, from the cache where they are known."""
    section = run.plan.recipe.evaluate
    assert section is not None
    settings = _evaluation_settings(run)
    key = json.dumps(
        [fingerprint, section.model_dump(mode="json"), settings, versions(), _texts(section)],
        sort_keys=True,
    )
    known = directory / "evaluations" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if known.exists():
        found: dict[str, Any] = json.loads(known.read_text())
        return found
    with reporter.phase("evaluate original", 1):
        found = evaluate_model(run.plan.source.path, section, **settings)
        reporter.step("done")
    known.parent.mkdir(parents=True, exist_ok=True)
    write_json(known, found)
    return found


def _texts(section: Any) -> list[list[Any]]:
    """Local evaluation texts by path, size and time, so that an edited file is measured again."""
    stamps = []
    for text in section.perplexity:
        for file in text.files() if text.dataset is None else []:
            stat = Path(file).stat()
            stamps.append([str(file), stat.st_size, stat.st_mtime_ns])
    return stamps


def _metrics(
    run: Run,
    evaluation: dict[str, Any],
    reporter: Reporter,
    started: float,
    command: Sequence[str] | None,
) -> dict[str, Any]:
    """What metrics.json holds."""
    plan, manifest = run.plan, run.workspace.manifest
    recipe, model = plan.recipe, plan.model
    planned = plan.predict(run.sizes or size_from_record(manifest["sizes"]))
    layers = [
        {"layer": int(index), **{k: v for k, v in record.items() if k not in ("modules", "sha256")}}
        for index, record in sorted(manifest["layers"].items(), key=lambda item: int(item[0]))
    ]
    warnings = [*plan.warnings]
    budget = None
    if plan.allowed is not None and recipe.budget is not None:
        attained = plan.attained(manifest["attained"])
        short = (plan.allowed - attained) / plan.scope
        way = "keep" if recipe.budget.keep is not None else "remove"
        share = recipe.budget.keep or recipe.budget.remove
        budget = {
            "requested": f"{way} {share:.0%} of {OWNER[recipe.budget.of]} {recipe.budget.unit}",
            "allowed": plan.allowed,
            "attained": attained,
            "shortfall_fraction": short,
        }
        if short > TOLERANCE:
            warnings.append(
                f"{short:.2%} of the original less than the budget allows is stored: the steps' "
                "sizes are too coarse"
            )
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
        "versions": {**_libraries(), "platform": sys.platform},
        "command": shlex.join(command) if command else None,
        "recipe": recipe.canonical(),
        "recipe_text": recipe.yaml(),
        "model": {
            "name": recipe.canonical()["model"],
            "model_type": model.config.model_type,
            "path": str(plan.source.path),
            "license": _license(plan.source.path),
        },
        "output_kind": "mctk",
        "calibration": calibration,
        "sizes": {
            "original": plan.original.as_dict(),
            "planned": planned.as_dict() if planned else None,
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
        "warnings": warnings,
    }


def _license(path: Path) -> str | None:
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
    return [f"no calibration token reached {', '.join(unseen[:3])}{more}"]
