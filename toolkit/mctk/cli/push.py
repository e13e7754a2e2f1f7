"""`mctk push`: a finished result to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

EPILOG = """\b
Examples:
  mctk push runs/d2moe_mixtral me/Mixtral-8x7B-D2-MoE-40
  mctk push runs/svdllm_dense me/svdllm-dense --private

\b
Uploads weights, config, tokenizer, recipe, report and the model card (README.md), which names the
original where that is a model on the hub. Caches, log and metrics.json stay here: they name paths.
`hf auth login` or HF_TOKEN says who you are. `mctk run RECIPE --push-to-hub OWNER/NAME` asks for
all of that before it begins, and uploads when it is finished."""


@click.command(epilog=EPILOG)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Create the repository so that only you see it.")
def command(directory: Path, repository: str, private: bool) -> None:
    """Upload DIRECTORY, a finished run or export, to the hub with its model card."""
    from mctk.publish import check_result, prepare, push

    prepare(repository, private, check_result(directory))
    click.echo(f"uploaded to {push(directory, repository)}")
