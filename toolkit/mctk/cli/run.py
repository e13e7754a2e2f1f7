"""`mctk run`: a recipe in, a checkpoint out."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from mctk.cli import completion

EPILOG = """\b
Examples:
  mctk run recipes/svdllm_demo.yaml
  mctk run recipes/svdllm_demo.yaml --set budget.remove=0.6 --output runs/svdllm_60
  mctk run my.yaml --model mistralai/Mixtral-8x7B-v0.1 --device cuda:0

The output directory is a model directory: `import mctk`, then load it by the Auto class that loads
the original, as AutoModelForCausalLM.from_pretrained(DIR). It also holds report.md, metrics.json,
run.log, the recipe and a model card. A run that was stopped goes on when the same command is given
again."""


def recipe_options(command: Any) -> Any:
    """Options that take the place of a recipe's keys; `run` and `plan` share them."""
    options = [
        click.argument("recipe", type=click.Path(), shell_complete=completion.recipes),
        click.option("--model", help="Model directory or hub name, in the recipe's place."),
        click.option("-o", "--output", help="Directory to write (default: runs/<recipe>)."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a key of the recipe, e.g. budget.remove=0.6 or steps.0.options.storage="
            "plain. May be given again.",
        ),
        click.option("--device", help="auto, cpu, cuda, cuda:1 ... (default: auto)."),
        click.option(
            "--dtype",
            help="Compute in auto, float32, bfloat16 or float16 (auto: the checkpoint's).",
        ),
        click.option(
            "--storage-dtype",
            help="Write new tensors in this dtype, and name it in config.json (auto: the model's).",
        ),
        click.option("--seed", type=int, help="Salt of everything that is drawn."),
        click.option(
            "--trust-remote-code/--no-trust-remote-code",
            default=None,
            help="DANGEROUS: run Python code that the model directory carries.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command(epilog=EPILOG)
@recipe_options
@click.option(
    "--cache", help="Statistics cache (default: $MCTK_CACHE, or mctk in your cache directory)."
)
@click.option(
    "--push-to-hub",
    "repository",
    metavar="OWNER/NAME",
    help="Upload the result and its model card there; token and name are checked before the run. A "
    "finished run is only uploaded.",
)
@click.option("--private", is_flag=True, help="Create that repository so that only you see it.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; the summary is still printed.")
@click.option("--json", "as_json", is_flag=True, help="Print metrics.json instead of the summary.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    cache: str | None,
    repository: str | None,
    private: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Compress a model as RECIPE says, check the result, evaluate it and report."""
    if private and repository is None:
        raise click.UsageError("--private has no effect without --push-to-hub")
    from mctk.engine import Reporter, run
    from mctk.recipe import load_recipe
    from mctk.registry import load_plugins
    from mctk.report import render_summary

    registry = load_plugins()
    loaded = load_recipe(recipe, overrides=list(overrides), registry=registry, **flags)
    if repository is not None:
        from mctk.evaluate.loading import resolve_device
        from mctk.planning import make_plan
        from mctk.publish import prepare, push

        if not loaded.gate:
            raise loaded.error(("gate",), "false, and what was not checked is not uploaded")
        # First, so that what cannot be planned leaves no empty repository behind.
        make_plan(loaded, registry, resolve_device(loaded.device), weights=False)
        prepare(repository, private, loaded.model_name if loaded.from_hub else None)
    reporter = Reporter(quiet=quiet)
    [metrics] = run(
        [loaded], registry, cache=cache, reporter=reporter, command=["mctk", *sys.argv[1:]]
    )
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        click.echo(render_summary(metrics, str(loaded.output)))
    if repository is not None:
        click.echo(f"uploaded to {push(loaded.output, repository)}", err=as_json)
