"""`mctk compare`: many methods at many budgets, one calibration, one table."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from mctk.cli import completion

if TYPE_CHECKING:
    from mctk.comparison.file import LoadedComparison
    from mctk.registry import Registry

EPILOG = """\b
Examples:
  mctk compare recipes/compare_demo.yaml
  mctk compare recipes/svdllm_demo.yaml recipes/d2moe_demo.yaml --remove 0.2,0.4,0.6
  mctk compare recipes/compare_demo.yaml --set budgets.remove=[0.5] --output runs/half
  mctk compare recipes/compare_mixtral.yaml --plan

\b
A comparison's file names a model, a calibration, budgets, what to evaluate, and rows: recipes, or
steps as a recipe has them. docs/recipes.md has all its keys. Recipes that are given instead of a
file become its rows; model, calibration and evaluation are the first one's, and they must agree.

\b
DIR holds comparison.md, .csv, .json, .tex and .html (one page with figures), and each row's model
in rows/. Finished rows are taken up: the same command again takes seconds, a row that is added to
the file is the only one made, and a command that was stopped goes on. A row that is refused or
fails is shown with the reason and stops no other; it is tried again next time.

\b
Exit code: 0 if every row has its figures, 1 if some have not, 2 if nothing could be compared."""


def _shares(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter("write shares with commas, such as 0.2,0.4,0.6") from error


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise click.BadParameter("write seeds with commas, such as 0,1,2") from error


@click.command(epilog=EPILOG)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(),
    shell_complete=completion.recipes,
)
@click.option(
    "--remove", callback=_shares, metavar="A,B", help="Shares to remove, in the budgets' place."
)
@click.option(
    "--seeds",
    callback=_seeds,
    metavar="A,B",
    help="Calibrations to draw; the tables then show mean and spread.",
)
@click.option("--model", help="Model directory or hub name, in the file's place.")
@click.option("-o", "--output", metavar="DIR", help="Directory to write (default: runs/<file>).")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the file, e.g. evaluate.tasks=[arc_easy]. May be given again.",
)
@click.option("--device", help="auto, cpu, cuda, cuda:1 ... (default: auto).")
@click.option("--dtype", help="Compute in auto, float32, bfloat16 or float16.")
@click.option("--storage-dtype", help="Write new tensors in this dtype (auto: the model's).")
@click.option(
    "--trust-remote-code/--no-trust-remote-code",
    default=None,
    help="DANGEROUS: run Python code that the model directory carries.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Processes that evaluate rows, and measure the original beside the calibration (default: "
    "as many as cores and memory allow, at most 8; 1 on a GPU).",
)
@click.option(
    "--cache", help="Statistics cache (default: $MCTK_CACHE, or mctk in your cache directory)."
)
@click.option(
    "--plan",
    "only_plan",
    is_flag=True,
    help="Print what each row will store, or why it is refused, and stop; reads headers only.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress; the table is still printed.")
@click.option("--json", "as_json", is_flag=True, help="Print comparison.json instead of tables.")
def command(
    files: tuple[str, ...],
    remove: list[float] | None,
    overrides: tuple[str, ...],
    jobs: int | None,
    cache: str | None,
    only_plan: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compare methods on one model and one calibration, and print the table.

    FILE is a comparison's file, or several recipes.
    """
    started = time.perf_counter()
    from mctk.comparison.file import load_comparison
    from mctk.comparison.run import run_comparison
    from mctk.registry import load_plugins

    registry = load_plugins()
    loaded = load_comparison(files, overrides, registry, remove, **flags)
    if only_plan:
        _print_plan(loaded, registry, as_json)
        return
    reporter = None
    if not quiet:
        from mctk.engine.progress import Reporter

        reporter = Reporter()
    found = run_comparison(
        loaded,
        registry,
        cache=cache,
        reporter=reporter,
        command=["mctk", *sys.argv[1:]],
        jobs=jobs,
        started=started,
    )
    if as_json:
        from mctk.comparison.result import to_json

        click.echo(json.dumps(to_json(found), indent=2, ensure_ascii=False))
    else:
        from mctk.comparison.terminal import terminal

        terminal(found)
        click.echo(f"\nin {loaded.output}: comparison.html, .md, .csv, .json, .tex; rows/")
    bad = [row for row in found.rows if row.status != "ok"]
    for row in bad:
        click.echo(f"{row.key}: {row.status}: {row.reason}", err=True)
    if bad:
        click.get_current_context().exit(1)


def _print_plan(loaded: LoadedComparison, registry: Registry, as_json: bool) -> None:
    """Prints every row's plan; exits with 1 if one is refused."""
    from mctk.cli.tables import print_table
    from mctk.comparison.planning import preview
    from mctk.report.tables import count, percent, size

    found = list(preview(loaded, registry))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in found], indent=2))
    else:
        rows = []
        for row in found:
            after = row.planned or {}
            kept = None
            if row.planned and row.original:
                kept = row.planned["parameters"] / row.original["parameters"]
            asked = f"-{100 * row.budget.remove:g} % {row.budget.unit}" if row.budget else ""
            figures = [count(after.get("parameters")), percent(kept), size(after.get("bytes"))]
            rows.append([row.name, asked, *figures, "; ".join(row.remarks)])
        print_table(["row", "asked", "parameters", "kept", "bytes", "remarks"], rows)
        click.echo(
            "\n—: data decide the size, within the budget. Memory and disk: mctk plan RECIPE"
        )
    if any(row.refused for row in found):
        click.get_current_context().exit(1)
