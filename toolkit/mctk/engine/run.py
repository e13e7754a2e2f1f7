"""Runs recipes: a set of runs over one model and one calibration; one run is a set of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import TokenWindows, calibration_windows
from ..errors import UserError
from ..evaluate.suite import load_tokenizer, resolve_device
from ..files import write_json, write_text
from ..models import has_expert_list
from ..plan import Plan, count_model, make_plan
from ..runtime import meta_tensors
from ..statistics import Need, StatisticsCache, cache_directory
from ..terms import Term
from .calibrate import cache_context, calibrate
from .compress import Run, Sample, compress, prepare_sample, size_from_record, size_record
from .conclude import conclude, evaluate_original
from .curves import measure_curves
from .gate import GateError, check_fresh_process, check_sizes, check_streamed
from .prepare import (
    Preparation,
    backward,
    measure_current,
    open_boundaries,
    without_gradients,
)
from .progress import Reporter
from .shards import copy_companions, write_config, write_index, write_outer
from .workspace import Workspace

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..registry import Registry

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
            if workspace.reopen_if_damaged(len(p.model.layers)):
                reporter.say(f"{workspace.output}: a finished file is gone or damaged; made again")
        registry.hook.run_started(run=runs[0] if len(runs) == 1 else runs)
        todo = [r for r in runs if not r.workspace.manifest["finished"]]
        for r in todo:
            # First, so that a text or task that cannot be measured costs no hours of compression.
            if r.plan.recipe.evaluate is not None:
                evaluate_original(r, directory, fingerprint, reporter)
        if todo:
            _compress_all(todo, windows, fingerprint, directory, registry, reporter)
        return [
            conclude(r, directory, fingerprint, reporter, started, command, registry) for r in runs
        ]
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
    collected = {"cache_hits": 0, "cache_misses": 0, "sweeps": 0, "backward_sweeps": 0}
    if windows is not None:
        collected |= _collect(runs, windows, fingerprint, directory, reporter)
    ids = windows.ids if windows is not None else _probe_ids(plan)
    sample = prepare_sample(model, ids)
    for r in runs:
        _decide_sizes(r, sample, reporter)
        manifest = r.workspace.manifest
        if "statistics" not in manifest or not manifest["layers"]:
            manifest["statistics"] = collected
        r.workspace.save()
    compress(model, runs, sample, reporter, registry)
    for r in runs:
        _finish_files(r, sample, reporter)


def _collect(
    runs: list[Run],
    windows: TokenWindows,
    fingerprint: str,
    directory: Path,
    reporter: Reporter,
) -> dict[str, int]:
    """Takes all statistics and runs the prepared steps; returns what that took."""
    plan, state = runs[0].plan, runs[0].workspace.state
    model, calibration = plan.model, plan.recipe.calibration
    assert calibration is not None
    batch = calibration.batch
    if has_expert_list(model.model) and any(
        need.gradient for r in runs for needs in r.plan.needs.values() for need in needs
    ):
        batch = 1  # rows of experts in a list do not say which sequence they are of
    cache = StatisticsCache(directory, cache_context(model, fingerprint, windows.digest, batch))
    preparations = [Preparation.of(r.plan, cache) for r in runs]
    for r, preparation in zip(runs, preparations, strict=True):
        r.preparation = preparation
    boundaries = open_boundaries(preparations, windows.ids, state)
    needs = _union([r.plan for r in runs])
    sweeps = calibrate(
        model, windows.ids, batch, needs, plan.sites, cache, state, reporter, boundaries
    )
    backwards = 0
    if boundaries is not None:
        backwards = backward(model, preparations, windows.ids, batch, boundaries, state, reporter)
        boundaries.clear()
    (state / "hidden.of").unlink(missing_ok=True)
    without_gradients(model, preparations, reporter)
    sweeps += measure_current(model, preparations, windows.ids, batch, reporter)
    for r, preparation in zip(runs, preparations, strict=True):
        r.plan.settle(preparation.meta())
    return {
        "cache_hits": cache.hits,
        "cache_misses": cache.misses,
        "sweeps": sweeps,
        "backward_sweeps": backwards,
    }


def _union(plans: list[Plan]) -> dict[int, list[Need]]:
    needs: dict[int, list[Need]] = {}
    for plan in plans:
        for layer, wanted in plan.needs.items():
            known = needs.setdefault(layer, [])
            known += [need for need in wanted if need not in known]
    return needs


def _decide_sizes(run: Run, sample: Sample, reporter: Reporter) -> None:
    """Allocates, or takes up what an interrupted run had allocated; restates the plan."""
    manifest = run.workspace.manifest
    if manifest["sizes"] is not None:
        run.sizes = size_from_record(manifest["sizes"])
        return
    curves = None
    if run.plan.needs_curves:
        if run.preparation is None:
            raise run.plan.recipe.error((), "calibration is missing; the allocator needs curves")
        path = run.workspace.state / "curves.json"
        curves = measure_curves(run.preparation, run.plan.model, sample, path, reporter)
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


def _finish_files(run: Run, sample: Sample, reporter: Reporter) -> None:
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
        raise GateError(f"{run.output}: 0 tensors differ from the original's")
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
            changed.setdefault(index, {})[name] = [
                Term.from_spec(spec, meta_tensors(spec)) for spec in specs
            ]
    return changed
