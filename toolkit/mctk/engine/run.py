"""Runs recipes: a set of runs over one model and one calibration; one run is a set of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import TokenWindows
from ..errors import UserError
from ..evaluate.loading import load_tokenizer, resolve_device
from ..files import room_for, write_json
from ..models import has_expert_list
from ..planning import Plan, count_windows, make_plan
from ..recipe import draw_calibration
from ..report.tables import size
from ..statistics import Need, StatisticsCache, cache_directory
from ..terms import SizeCurve
from .calibrate import cache_context, calibrate
from .compress import Run, compress, prepare_sample, size_from_record, size_record
from .conclude import conclude, evaluate_original
from .current import measure_current
from .curves import measure_curves
from .fate import Fate, alive, together
from .finish import finish_files
from .prepare import (
    Preparation,
    backward,
    open_boundaries,
    without_gradients,
)
from .progress import Reporter
from .sequential import Tokens
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
    keep_going: bool = False,
    fresh_process: bool = True,
) -> list[Any]:
    """Runs recipes that share model, calibration and compute dtype.

    Args:
        recipes: The recipes; their layers are read once for all of them.
        registry: The plugins.
        cache: Directory of the statistics cache; see `cache_directory`.
        reporter: Progress; silent by default.
        command: The command line, for reports.
        keep_going: A run that fails, in its plan or later, does not stop the others.
        fresh_process: Whether the gate loads each result in a process of its own; if not, what that
            would be held against is kept for `check_probe`.

    Returns:
        Each run's metrics (a dictionary), as its metrics.json holds them; if the set keeps going,
        in the place of a run that failed the exception.

    Raises:
        UserError: Whatever is wrong with recipes, model, text or output directories; nothing has
            been written over then.
    """
    reporter = reporter or Reporter(quiet=True)
    started = time.perf_counter()
    directory = cache_directory(cache)
    device = resolve_device(recipes[0].device)
    _check_set(recipes)
    fates = [Fate(str(recipe.output), reporter.say, keep_going) for recipe in recipes]
    runs: list[Run] = []
    found: list[Any] = []
    try:
        plans = _plan_all(recipes, fates, registry, device)
        if plans:
            windows = read_calibration(plans[0][0])
            fingerprint = plans[0][0].source.fingerprint(directory)
            for plan, fate in plans:
                with fate.own():
                    _open(plan, fate, fingerprint, windows, runs, reporter)
        if runs:
            registry.call("run_started", run=runs[0] if len(recipes) == 1 else runs)
        todo = [r for r in alive(runs) if not r.workspace.manifest["finished"]]
        for r in todo:
            # First, so that a text or task that cannot be measured costs no hours of compression.
            if r.plan.recipe.evaluate is not None:
                with r.fate.own():
                    evaluate_original(r, directory, fingerprint, reporter)
        if todo := alive(todo):
            _compress_all(todo, windows, fingerprint, directory, registry, reporter, fresh_process)
        metrics: dict[int, dict[str, Any]] = {}
        for r in alive(runs):
            with r.fate.own():
                metrics[id(r.fate)] = conclude(
                    r, directory, fingerprint, reporter, started, command, registry
                )
        found = [fate.error or metrics[id(fate)] for fate in fates]
    finally:
        for r in runs:
            r.workspace.close()
        reporter.close()
    return found


def _plan_all(
    recipes: Sequence[Recipe], fates: Sequence[Fate], registry: Registry, device: str
) -> list[tuple[Plan, Fate]]:
    """Plans the runs, all on one model; those that cannot be planned are left out."""
    plans: list[tuple[Plan, Fate]] = []
    measured: list[Any] = []  # what is evaluated, mostly the same for all
    for recipe, fate in zip(recipes, fates, strict=True):
        with fate.own():
            model = plans[0][0].model if plans else None
            plan = make_plan(recipe, registry, device, model)
            if len(recipes) == 1:  # of many `mctk compare` says how much they take together
                _check_room(plan)
            if recipe.evaluate not in measured:
                count_windows(plan)
                measured.append(recipe.evaluate)
            plans.append((plan, fate))
    return plans


def _check_room(plan: Plan) -> None:
    """Refuses a run whose output would fill the disk, where its size is known before.

    Raises:
        RecipeError: It is larger than what is free.
    """
    changed = None if plan.needs_curves or plan.pending else plan.layout(plan.solve())
    if changed is None:
        return  # data decide its size; `mctk plan` has a bound, and warns
    need = plan.count(changed).bytes
    place, free = room_for(plan.recipe.output)
    if need > free:
        raise plan.recipe.error(
            ("output",),
            f"the result takes {size(need)}, and {place} has {size(free)} free; "
            "choose an output on a larger disk",
        )


def _open(
    plan: Plan,
    fate: Fate,
    fingerprint: str,
    windows: TokenWindows | None,
    runs: list[Run],
    reporter: Reporter,
) -> None:
    """Opens a run's directory and adds the run to `runs`."""
    workspace = Workspace(plan.recipe.output)
    workspace.open(_identity(plan, fingerprint, windows), plan.source.commit)
    runs.append(Run(plan, workspace, fate))
    workspace.manifest["sources"] = sorted(set(windows.sources)) if windows else []
    reporter.add_log(workspace.output / "run.log")
    if workspace.reopen_if_damaged(len(plan.model.layers)):
        reporter.say(f"{workspace.output}: a finished file is gone or damaged; made again")


def read_calibration(plan: Plan) -> TokenWindows | None:
    """The calibration's token windows; None if the recipe has none."""
    if plan.recipe.calibration is None:
        return None
    tokenizer = load_tokenizer(plan.source.path, plan.recipe.trust_remote_code)
    return draw_calibration(plan.recipe, tokenizer)


def _check_set(recipes: Sequence[Recipe]) -> None:
    """Runs of one set must read the same model on the same text, and write to their own places."""
    first = recipes[0]
    outputs = {recipe.output.resolve() for recipe in recipes}
    if len(outputs) < len(recipes):
        raise UserError("output: two runs of one set have the same output directory")
    for recipe in recipes:
        for key in ("model", "revision", "trust_remote_code", "dtype", "seed"):
            if getattr(recipe, key) != getattr(first, key):
                raise recipe.error((key,), "differs between the runs of one set")
        if _text(recipe) != _text(first):
            raise recipe.error(("calibration",), "differs between the runs of one set")


def _text(recipe: Recipe) -> dict[str, Any] | None:
    """What a calibration is drawn from, and how: all of it but what later layers see."""
    if recipe.calibration is None:
        return None
    return recipe.calibration.model_dump(exclude={"propagate"})


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
    fresh_process: bool,
) -> None:
    """Everything up to the written and checked files."""
    plan = runs[0].plan
    model = plan.model
    collected = {"cache_hits": 0, "cache_misses": 0, "sweeps": 0, "backward_sweeps": 0}
    if windows is not None:
        collected |= _collect(runs, windows, fingerprint, directory, reporter)
    if not (runs := alive(runs)):
        return
    ids = windows.ids if windows is not None else _probe_ids(plan)
    sample = prepare_sample(model, ids)
    curves = measure_curves([r for r in runs if _wants_curves(r)], model, sample, reporter)
    for r in alive(runs):
        with r.fate.own():
            _decide_sizes(r, curves.get(id(r)))
            manifest = r.workspace.manifest
            if "statistics" not in manifest or not manifest["layers"]:
                manifest["statistics"] = dict(collected)
                if r.plan.recollected:  # the passes take its tokens along, layer by layer
                    manifest["statistics"]["compressed_sweeps"] = 1
            r.workspace.save()
    calibration = plan.recipe.calibration
    tokens = Tokens(windows.ids, calibration.batch) if windows and calibration else None
    compress(model, alive(runs), sample, tokens, reporter, registry)
    for r in alive(runs):
        with r.fate.own():
            finish_files(r, sample, reporter, fresh_process)


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
    ids, batch = windows.ids, calibration.batch
    if has_expert_list(model.model) and any(
        need.gradient for r in runs for needs in r.plan.needs.values() for need in needs
    ):
        batch = 1  # rows of experts in a list do not say which sequence they are of
    cache = StatisticsCache(directory, cache_context(model, fingerprint, windows.digest, batch))
    preparations = []
    for r in runs:
        r.preparation = Preparation.of(r.plan, cache, r.fate)
        preparations.append(r.preparation)
    boundaries = open_boundaries(preparations, ids, state)

    def forward(some: list[Preparation]) -> int:
        needs = _union([preparation.plan for preparation in some])
        return calibrate(model, ids, batch, needs, plan.sites, cache, state, reporter, boundaries)

    def back(some: list[Preparation]) -> int:
        assert boundaries is not None
        return backward(model, some, ids, batch, boundaries, state, reporter)

    sweeps, backwards = together(preparations, forward), 0
    if boundaries is not None:
        backwards = together(preparations, back)
        boundaries.clear()
    (state / "hidden.of").unlink(missing_ok=True)
    without_gradients(model, alive(preparations), reporter)
    sweeps += together(
        preparations, lambda some: measure_current(model, some, ids, batch, reporter)
    )
    for preparation in alive(preparations):
        with preparation.fate.own():
            preparation.plan.settle(preparation.meta())
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


def _wants_curves(run: Run) -> bool:
    """Whether a run's sizes wait for curves."""
    undecided = run.workspace.manifest["sizes"] is None and run.plan.needs_curves
    return undecided and run.preparation is not None


def _decide_sizes(run: Run, curves: list[SizeCurve] | None) -> None:
    """Allocates, or takes up what an interrupted run had allocated; restates the plan."""
    manifest = run.workspace.manifest
    if manifest["sizes"] is not None:
        run.sizes = size_from_record(manifest["sizes"])
        return
    if run.plan.needs_curves and run.preparation is None:
        raise run.plan.recipe.error((), "calibration is missing; the allocator needs curves")
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
