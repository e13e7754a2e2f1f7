"""The written layers become a checkpoint: its other files, and the gate."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..files import write_text
from ..planning import count_model, uniform
from ..runtime import meta_tensors
from ..terms import Bank, Term, compact
from .compress import Run, Sample
from .gate import GateError, check_fresh_process, check_sizes, check_streamed
from .probe import keep_probe
from .progress import Reporter
from .shards import (
    copy_companions,
    experts_kept,
    write_config,
    write_index,
    write_outer,
    written_kind,
)


def finish_files(run: Run, sample: Sample, reporter: Reporter, fresh_process: bool) -> None:
    """Writes outer shard, index, config and companions; then the gate.

    Args:
        run: The run; all its layers are written.
        sample: The gate's sequence.
        reporter: Progress.
        fresh_process: Whether the gate loads the result in a process of its own; see `run`.

    Raises:
        GateError: The files do not compute what the terms did, or are of other sizes.
    """
    plan, workspace, model = run.plan, run.workspace, run.plan.model
    layers = workspace.manifest["layers"]
    records = [layers[str(index)] for index in range(len(model.layers))]
    modules = {path: spec for record in records for path, spec in record["modules"].items()}
    left = experts_kept(layers)
    kind = written_kind(plan, modules, left)
    if workspace.outer() is None:
        workspace.add_outer(write_outer(plan, run.output, left))
    files = [workspace.manifest["outer"]["file"], *(record["file"] for record in records)]
    parameters, nbytes = write_index(run.output, files, modules)
    steps = [f"{s.stage}/{s.method.name} v{s.method.version}" for s in plan.recipe.steps]
    write_config(plan, run.output, modules, _providers(modules), steps, left)
    workspace.manifest["output_kind"] = kind
    copy_companions(plan.source, run.output)
    write_text(run.output / "recipe.yaml", plan.recipe.published())
    changed = sum(record["new"] for record in records)
    total = changed + sum(record["copied"] for record in records)
    total += workspace.manifest["outer"]["copied"]
    if changed == 0:
        raise GateError(f"{run.output}: 0 tensors differ from the original's")
    gate: dict[str, Any] = {"tensors_changed": changed, "tensors_total": total}
    terms = plan.layout(run.sizes)
    if terms is not None:
        check_sizes(plan.count(terms), parameters, nbytes)
    gate["sizes_equal"] = True
    if plan.recipe.gate:
        name = run.output.name
        with reporter.phase("gate", 2 if fresh_process else 1):
            assert run.hidden is not None
            expected = model.head(sample.ids, run.hidden.to(model.device)).cpu()
            gate |= check_streamed(run.output, model, sample.ids, expected)
            equal = f"{name}: the files give the computed logits, bit by bit"
            if fresh_process:
                reporter.step(equal)
                gate |= check_fresh_process(
                    run.output, workspace.state, model, sample.ids, expected, kind == "native"
                )
                reporter.step(
                    f"{name}: from_pretrained in a fresh process gives the same bits"
                    if gate["fresh_process_equal"]
                    else f"{name}: from_pretrained was left out: the model does not fit into memory"
                )
            else:
                keep_probe(workspace.state, sample.ids, expected)
                gate["fresh_process_equal"] = None
                reporter.step(f"{equal}; from_pretrained is left to the evaluation's process")
    workspace.manifest["gate"] = gate
    gone = plan.left_out(uniform(plan, left))
    workspace.manifest["attained"] = _attained(run, gone, parameters, nbytes)
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


def _attained(run: Run, gone: Collection[str], parameters: int, nbytes: int) -> dict[str, int]:
    """The result's sizes: stored ones from the files, active ones from the terms in them."""
    sizes = count_model(run.plan.model, terms_of(run), gone).as_dict()
    return {**sizes, "parameters": parameters, "bytes": nbytes}


def terms_of(run: Run) -> dict[int, dict[str, list[Term]]]:
    """The written terms, on meta, from the manifest's module specs."""
    changed: dict[int, dict[str, list[Term]]] = {}
    for index, sites in enumerate(run.plan.sites):
        record = run.workspace.manifest["layers"][str(index)]
        modules, kept = record["modules"], record.get("kept")
        prefix = f"{run.plan.model.layers_path}.{index}."
        for name, site in sites.items():
            entry = modules.get(prefix + site.module)
            if entry is None and kept and site.part != "linear":
                bank = Bank(name, index, site.shape, run.plan.original_terms(index, site))
                dtype = run.plan.storage_dtype(index, site)
                terms = compact(bank, kept).terms
                changed.setdefault(index, {})[name] = [term.to(dtype=dtype) for term in terms]
            if entry is None:
                continue
            specs = entry["terms"] if site.part == "linear" else entry["terms"][site.part]
            changed.setdefault(index, {})[name] = [
                Term.from_spec(spec, meta_tensors(spec)) for spec in specs
            ]
    return changed
