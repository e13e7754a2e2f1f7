"""`mctk plan`: what a run will do and cost."""

from __future__ import annotations

import json
from typing import Any

import click

from .run import recipe_options

EPILOG = """\b
Reads config.json and the headers of the weight files, never the weights, and finds the mistakes
that can be found there, the first at a time: keys, methods, targets, sizes, budget, damaged or
missing files, too little calibration text. Sizes are exact unless an allocator decides by
measured errors; then they are a bound, and the plan says so.

\b
Example:
  mctk plan recipes/svdllm_demo.yaml --set budget.remove=0.6"""


FORMATS = {
    "mctk": "format: mctk; loads after `import mctk`",
    "native": "format: native; an ordinary checkpoint with fewer experts, loads without mctk",
}


@click.command(epilog=EPILOG)
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe: str, overrides: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Check RECIPE and show what it will do and cost."""
    from mctk.evaluate.loading import resolve_device
    from mctk.planning import describe, make_plan
    from mctk.recipe import load_recipe
    from mctk.registry import load_plugins

    registry = load_plugins()
    loaded = load_recipe(recipe, overrides=list(overrides), registry=registry, **flags)
    device = resolve_device(loaded.device)
    plan = describe(make_plan(loaded, registry, device, weights=False))
    if as_json:
        click.echo(json.dumps(plan, indent=2))
    else:
        _show(plan)


def _show(plan: dict[str, Any]) -> None:
    from mctk.cli.tables import print_table
    from mctk.report.tables import count, ranges, size

    model, sizes = plan["model"], plan["sizes"]
    where = f"{model['name']} at commit {model['commit']}" if model["commit"] else model["path"]
    click.echo(
        f"{where}: {model['type']}, {model['layers']} layers, computed in "
        f"{model['dtype']} on {model['device']}\n{_side(model['side'])}"
        f"writes {plan['output']['path']} ({FORMATS[plan['output']['kind']]})\n"
    )
    for number, step in enumerate(plan["steps"], 1):
        asked = f", size {step['size']}" if step["size"] else ""
        asked += f" by allocate/{plan['allocate']}" if step["size"] == "auto" else ""
        layers = ranges(step["layers"])
        click.echo(
            f"step {number}: {step['method']} on {', '.join(step['banks'])} of layers "
            f"{layers}{asked}"
        )
    click.echo()
    if sizes["planned"]:
        rows = []
        for name, value in sizes["original"].items():
            planned, at_most = sizes["planned"][name], "≤ " if name in sizes["at_most"] else ""
            kept = f"{at_most}{planned / value:.1%}" if value else ""
            rows.append([*_size_row(name, value), at_most + _size_row(name, planned)[1], kept])
        header = "planned (exact)" if sizes["exact"] else "planned"
        print_table(["", "original", header, "kept"], rows)
        if sizes["at_most"]:
            click.echo(
                "≤: at most; how many experts a token skips, or which of them share weights, "
                "depends on calibration"
            )
    else:
        print_table(["", "original"], [_size_row(*item) for item in sizes["original"].items()])
        if sizes["bound"]:
            bound = sizes["bound"]
            click.echo(
                f"\nplanned: between {bound['least']:,} and {bound['most']:,} {bound['unit']} "
                "(a bound: the allocator decides by measured errors)"
            )
    speed = plan["speed"]
    if speed and speed["bound"] == 1:
        click.echo(
            f"\nspeed: a token's experts multiply as often as in the original, "
            f"{count(speed['expert_macs'])} times: less memory, and no faster"
        )
    elif speed and (speed["bound"] or sizes["at_most"]):
        faster = (
            f": at most {speed['bound']:.2f} times as fast as the original experts"
            if speed["bound"]
            else "; how much faster they are depends on calibration"
        )
        click.echo(
            f"\nspeed: the experts multiply {'at most ' if sizes['at_most'] else ''}"
            f"{count(speed['planned_expert_macs'])} times per token instead of "
            f"{count(speed['expert_macs'])}{faster}"
        )
    click.echo()
    _show_layers(plan["layers"])
    if plan["statistics"]:
        click.echo()
        print_table(
            ["statistic", "layers", "on disk"],
            [[row["need"], row["layers"], size(row["bytes"])] for row in plan["statistics"]],
        )
    calibration, resources = plan["calibration"], plan["resources"]
    click.echo()
    if calibration:
        checked = "enough text" if calibration["checked"] else f"not checked: {calibration['why']}"
        click.echo(
            f"calibration: {calibration['sequences']} sequences of {calibration['length']} tokens "
            f"({checked})"
        )
    evaluation = plan["evaluation"]
    if evaluation:
        texts = [f"{name} ({n or 'all'} windows)" for name, n in evaluation["windows"].items()]
        click.echo("evaluation: " + ", ".join([*texts, *evaluation["tasks"]]))
    click.echo(
        f"sweeps: {plan['sweeps']} forward"
        + (f" and {plan['backward_sweeps']} backward" if plan["backward_sweeps"] else "")
        + (", and one on the compressed layers as they come" if plan["recollected"] else "")
        + f"; the weights are read {plan['weight_reads']} times, one layer in memory at a time\n"
        f"peak memory: about {size(resources['peak_memory'])} beside the libraries; disk: at most "
        f"{size(resources['disk_output'])} for the output, {size(resources['disk_statistics'])} "
        f"for statistics, {size(resources['disk_temporary'])} temporary"
    )
    for warning in plan["warnings"]:
        click.echo(f"warning: {warning}")


def _side(parts: dict[str, dict[str, int]]) -> str:
    """What a model of several modalities has beside its text model, if anything."""
    from mctk.report.tables import count, size

    shown = [f"{part} {count(weighs['parameters'])}" for part, weighs in parts.items()]
    total = sum(weighs["bytes"] for weighs in parts.values())
    return f"not text, copied as it is: {', '.join(shown)} ({size(total)})\n" if shown else ""


def _size_row(name: str, value: int) -> list[str]:
    """A size's name in words and its value in its unit."""
    from mctk.report.tables import count, size

    return [name.replace("_", " "), (size if name.endswith("bytes") else count)(value)]


def _show_layers(rows: list[dict[str, Any]]) -> None:
    """One line for each run of layers with the same sizes.

    A setting is a rank, or how many experts, channels or entries stay, as the step's method counts.
    """
    from mctk.cli.tables import print_table
    from mctk.report.tables import count, ranges

    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        key = tuple(value for name, value in row.items() if name != "layer")
        groups.setdefault(key, []).append(row["layer"])
    lines = []
    for (bank, members, out, columns, setting, parameters, original), layers in groups.items():
        matrices = f"{members} × " if members > 1 else ""
        kept = f"{parameters / original:.1%}" if parameters is not None else "decided by errors"
        known = "" if parameters is None else count(parameters)
        shown = "" if setting is None else setting
        lines.append([ranges(layers), bank, f"{matrices}{out} × {columns}", shown, known, kept])
    print_table(["layers", "bank", "matrices", "setting", "parameters", "kept"], lines)
