"""A plan in words and numbers: what `mctk plan` prints."""

from __future__ import annotations

from typing import Any

from ..checkpoint import ModelSizes, expert_macs, experts_per_token
from ..files import room_for
from ..statistics import Need, RoutedOutputs, size_of
from ..terms import DENSE
from .bounds import at_most, beside, coarse_warning, router_rows, uneven_warning
from .budget import TOLERANCE
from .counting import count_model
from .layout import DataDecide, MetaTerms, lay_out_layer
from .plan import Plan, Size
from .quantised import byte_warnings, quantised_record
from .removal import foreseen, output_kind, with_experts
from .side import side_sizes
from .texts import check_calibration, check_evaluation
from .unread import unread_record, unread_warnings


def describe(plan: Plan) -> dict[str, Any]:
    """Everything that a plan says, as JSON data.

    Sizes are exact where they do not depend on data. Where an allocator decides by measured
    errors they are a bound: at most the budget, at least the budget less the tolerance; the banks'
    settings are unknown then. Sizes that are named under `at_most` are bounds by themselves.
    """
    recipe, model = plan.recipe, plan.model
    sizes = None if plan.needs_curves or plan.pending else plan.solve()
    changed = None if sizes is None else plan.layout(sizes)
    kind = _kind(plan, sizes, changed)
    experts = foreseen(plan, sizes) if changed is None else plan.said(changed)
    predicted = None if changed is None else plan.count(changed)
    bounded = at_most(changed) if changed is not None else []
    planned: dict[str, Any] | None = predicted.as_dict() if predicted else None
    needed = resources(plan, predicted)
    coarse: list[str] = []
    if changed is not None and recipe.budget is not None:
        coarse = coarse_warning(plan, plan.in_scope(changed))
    bound = None
    if predicted is None and plan.allowed is not None and recipe.budget is not None:
        left = {} if experts is None else dict.fromkeys(with_experts(plan), experts)
        end = plan.allowed if plan.reachable is None else plan.reachable
        least = end + beside(plan, left) - int(TOLERANCE * plan.scope)
        most = end + beside(plan, left) + router_rows(plan, left)
        bound = {"unit": recipe.budget.unit, "most": most, "least": least}
    needs = [need for layer in plan.needs.values() for need in layer]
    current = any(need.current for need in needs)
    sweeps, backward = bool(needs) + current, int(any(need.gradient for need in needs))
    again = bool(recipe.calibration and (recipe.calibration.keep_every or 1) > 1)
    layers = _layers(plan, sizes, changed)
    return {
        "model": {
            "path": str(plan.source.path),
            "name": recipe.model_name,
            "commit": plan.source.commit,
            "type": model.config.model_type,
            "layers": len(model.layers),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "side": side_sizes(model),
        },
        "output": {"path": str(recipe.output), "kind": kind},
        "quantised_source": quantised_record(plan),
        "unread": unread_record(plan, experts),
        "steps": [_step(plan, number) for number in range(len(recipe.steps))],
        "allocate": recipe.allocate.method.name if recipe.allocate else None,
        "sizes": {
            "original": plan.original.as_dict(),
            "planned": planned,
            "exact": predicted is not None and not bounded,
            "at_most": bounded,
            "bound": bound,
        },
        "speed": _speed(plan, changed, bool(bounded)),
        "layers": layers,
        "statistics": _statistics(plan),
        "sweeps": sweeps,
        "backward_sweeps": backward,
        "recollected": bool(plan.recollected),
        "weight_reads": 1 + sweeps + backward + again + plan.needs_curves + recipe.gate,
        "calibration": check_calibration(plan),
        "evaluation": check_evaluation(plan),
        "resources": needed,
        "warnings": [
            *plan.warnings,
            *coarse,
            *_grown(layers),
            *uneven_warning(plan, layers),
            *unread_warnings(plan, experts),
            *byte_warnings(plan, predicted.bytes if predicted else None),
            *_short_of_disk(plan, needed),
        ],
    }


def _kind(plan: Plan, sizes: Size | None, changed: MetaTerms | None) -> str:
    """The form of the result; where sizes wait for data, as with the smallest."""
    if sizes is None and not plan.pending:
        sizes = plan.smallest()
        changed = plan.layout(sizes)
    return "mctk" if sizes is None else output_kind(plan, sizes, changed)


def _grown(layers: list[dict[str, Any]]) -> list[str]:
    """A warning where banks are stored larger than the original: merged, and left at that."""
    grown = [r for r in layers if r["parameters"] and r["parameters"] > r["original_parameters"]]
    if not grown:
        return []
    banks = ", ".join(sorted({row["bank"] for row in grown}))
    numbers = ", ".join(str(n) for n in sorted({row["layer"] for row in grown}))
    return [
        f"{banks} of layers {numbers} are stored larger than in the original: a merge that no "
        "decompose step follows keeps a base and every residual"
    ]


def _speed(plan: Plan, changed: MetaTerms | None, at_most: bool) -> dict[str, Any] | None:
    """How much less the routed experts multiply for a token: a bound on their speed-up.

    What experts share counts once per token, as the run time computes it. With one base of which p
    is kept and low-rank differences of ratio ρ, k experts of a token cost ``p + k ρ`` instead of k.
    None where the sizes are not known yet, or nothing is routed; without a bound where what is
    multiplied is one itself (`at_most`).
    """
    k = experts_per_token(plan.model.config)
    before = expert_macs(plan.model.layers, k, {})
    if changed is None or not before:
        return None
    after = expert_macs(plan.model.layers, k, changed)
    bound = before / after if after and not at_most else None
    return {"expert_macs": before, "planned_expert_macs": after, "bound": bound}


def _step(plan: Plan, number: int) -> dict[str, Any]:
    step = plan.recipe.steps[number]
    layers = plan.targets[number]
    size = step.size
    asked = None
    if size is not None:
        asked = "auto" if size.auto else f"rank {size.rank}" if size.rank else f"keep {size.keep}"
    return {
        "method": f"{step.stage}/{step.method.name}",
        "version": step.method.version,
        "banks": sorted({bank for banks in layers.values() for bank in banks}),
        "layers": sorted(layers),
        "size": asked,
        "options": step.options.model_dump(mode="json"),
    }


def _layers(plan: Plan, sizes: Size | None, changed: MetaTerms | None) -> list[dict[str, Any]]:
    """Per layer and targeted bank: its shape, and its setting and parameters where known."""
    if sizes is None:
        # What is certain is shown, banks of auto steps as they are before them.
        changed = plan.layout(plan.sizes())
    rows = []
    for layer, sites in enumerate(plan.sites):
        for name, site in sites.items():
            steps = [n for n, targets in enumerate(plan.targets) if name in targets.get(layer, ())]
            if not steps:
                continue
            sized = [n for n in steps if plan.recipe.steps[n].size is not None]
            setting = _setting(plan, sizes, sized[0], layer, name) if sized else None
            known = changed is not None and (
                sizes is not None or not any(plan.recipe.steps[n].auto for n in steps)
            )
            terms = (changed or {}).get(layer, {}).get(name) or plan.original_terms(layer, site)
            rows.append(
                {
                    "layer": layer,
                    "bank": name,
                    "members": site.shape.members,
                    "out": site.shape.out_features,
                    "in": site.shape.in_features,
                    "setting": "dense" if setting == DENSE else setting,
                    "parameters": sum(term.parameters() for term in terms) if known else None,
                    "original_parameters": site.shape.parameters,
                }
            )
    return rows


def _setting(plan: Plan, sizes: Size | None, number: int, layer: int, bank: str) -> int | None:
    """A step's setting on a bank; None where errors that are not measured yet decide it."""
    if sizes is not None:
        return sizes[number, layer, bank]
    step = plan.recipe.steps[number]
    return None if step.auto else plan.setting(number, layer, plan.group_of(number, layer, bank))


def _statistics(plan: Plan) -> list[dict[str, Any]]:
    """What is collected: each kind of need, in how many layers, how many bytes in all."""
    if plan.recipe.calibration is None:
        return []
    length = plan.recipe.calibration.length
    hidden = plan.model.config.get_text_config().hidden_size
    found: dict[str, dict[str, Any]] = {}
    for needs in plan.recollected.values():
        for need in needs:  # in memory, while their layer is worked on
            name = f"{_need_name(need)} of the compressed prefix"
            found.setdefault(name, {"need": name, "layers": 0, "bytes": 0})["layers"] += 1
    for layer, needs in plan.needs.items():
        for need in needs:
            name = _need_name(need)
            row = found.setdefault(name, {"need": name, "layers": 0, "bytes": 0})
            row["layers"] += 1
            if not need.transient:  # that is never on disk
                row["bytes"] += size_of(
                    need, plan.sites[layer], hidden, plan.model.dtype.itemsize, length
                )
    return list(found.values())


def _need_name(need: Need) -> str:
    """A need in words: its kind and what is not left at the usual."""
    settings = {k: v for k, v in need.identity().items() if k not in ("kind", "version")}
    words = [
        k if v is True else str(v) for k, v in settings.items() if v not in (False, "original")
    ]
    return f"{type(need).__name__}({', '.join(words)})"


def resources(plan: Plan, predicted: ModelSizes | None) -> dict[str, int]:
    """Estimates in bytes: peak memory, and disk for output, statistics and temporary files.

    Memory counts what scales with the model and the calibration set: a layer twice (as read and as
    converted), embeddings and head, hidden states going in and out, the layer's statistics,
    float64 workspace for the largest decomposition, and directions that are kept to be cut again.
    """
    recipe, model = plan.recipe, plan.model
    itemsize = model.dtype.itemsize

    def loaded(names: list[str]) -> int:
        return sum(plan.source.tensors[name].numel for name in names) * itemsize

    hidden = temporary = 0
    in_layer: list[int] = [0]
    kept = 0
    if recipe.calibration is not None:
        width = model.config.get_text_config().hidden_size
        length = recipe.calibration.length
        hidden = recipe.calibration.sequences * length * model.wiring.passing()
        temporary = hidden
        for layer, needs in plan.needs.items():
            sizes = {n: size_of(n, plan.sites[layer], width, itemsize, length) for n in needs}
            in_layer.append(sum(sizes.values()))
            kept += sum(size for need, size in sizes.items() if not need.transient)
        for needs in plan.recollected.values():
            in_layer.append(
                sum(size_of(n, plan.sites[layer], width, itemsize, length) for n in needs)
            )
        if plan.recollected:
            # What enters the layer at work and the next one; the original's, too, if compared.
            compared = any(
                isinstance(n, RoutedOutputs) for needs in plan.recollected.values() for n in needs
            )
            temporary += 2 * hidden * (1 + compared)
        if any(need.gradient for needs in plan.needs.values() for need in needs):
            # What enters every layer (fewer with keep_every), the last one's output, and gradients.
            every = min(recipe.calibration.keep_every or 1, len(model.layers))
            temporary += hidden * (-(-len(model.layers) // every) + every + 1)
    kept += _prepared_bytes(plan)
    shapes = [site.shape for sites in plan.sites for site in sites.values()]
    side = max((min(s.out_features, s.in_features) for s in shapes), default=0)
    layer_bytes = max(loaded(names) for names in model.layer_tensors)
    workspace = 4 * 8 * side**2
    split = 0
    if plan.prepared:
        split = max(  # bases and residuals, in float32
            4 * sum(sites[name].shape.parameters for name in plan.targets[0].get(layer, []))
            for layer, sites in enumerate(plan.sites)
        )
    # A lone run's directions, found for size curves and for factors (engine/compress.py).
    traded = recipe.allocate is not None and recipe.allocate.method.needs_curves
    found = max(8 * loaded(names) // itemsize for names in model.layer_tensors)
    work = max(in_layer) + split + workspace + (found if traded else 0)
    peak = 2 * layer_bytes + loaded(model.outer_tensors) + 2 * hidden + work
    return {
        "peak_memory": peak,
        "disk_output": predicted.bytes if predicted else _most_bytes(plan),
        "disk_statistics": kept,
        "disk_temporary": temporary,
    }


def _short_of_disk(plan: Plan, needed: dict[str, int]) -> list[str]:
    """Warns where what a run writes beside its output may not find room."""
    place, free = room_for(plan.recipe.output)
    need = needed["disk_output"] + needed["disk_temporary"]
    if need <= free:
        return []
    from ..report.tables import size

    return [
        f"output and temporary files may take {size(need)}, and {place} has {size(free)} free: "
        "choose an output on a larger disk"
    ]


def _prepared_bytes(plan: Plan) -> int:
    """What prepared steps keep on disk: in float32, all terms but residuals.

    Where data decide how many bases there are, as if there were half as many as experts.
    """
    if not plan.prepared:
        return 0
    total = 0
    try:
        fixed = plan.sizes()
        for layer, sites in enumerate(plan.sites):
            changed = lay_out_layer(plan, fixed, plan.prepared, layer)
            for name, terms in changed.get(layer, {}).items():
                each = tuple(range(sites[name].shape.members))
                total += 4 * sum(t.parameters() for t in terms if t.slots != each)
    except DataDecide:
        return 2 * sum(
            plan.sites[layer][name].shape.parameters
            for layer, names in plan.targets[0].items()
            for name in names
        )
    return total


def _most_bytes(plan: Plan) -> int:
    """What an output whose sizes are not known yet takes at most: new terms may be in a wider type.

    Banks never store more elements than the original's; the positions of a pivoted bank are few.
    """
    wider = max(
        (
            plan.storage_dtype(layer, site).itemsize / plan.source_dtype(layer, site).itemsize
            for layer, sites in enumerate(plan.sites)
            for site in sites.values()
        ),
        default=1.0,
    )
    return int(count_model(plan.model, {}).bytes * max(1.0, wider) * 1.01)
