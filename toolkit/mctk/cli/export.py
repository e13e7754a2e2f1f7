"""`mctk export`: a compressed checkpoint in a form that other clients load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mctk.cli.progress import progress

if TYPE_CHECKING:
    from mctk.export import Exported

EPILOG = """\b
Examples:
  mctk export runs/svdllm_demo --dense -o runs/svdllm_dense
  mctk export runs/mone --expert-substitution -o runs/mone_vllm

\b
A dense export is as large as the original: it is for clients that know no low rank, and for
evaluating elsewhere. What is written is compared with the compressed model on a few tokens; if
the logits differ by more than rounding, nothing is kept."""


@click.command(epilog=EPILOG)
@click.argument("model", metavar="DIRECTORY")
@click.option(
    "--dense",
    is_flag=True,
    help="Multiply terms back into the original architecture; loads in plain transformers.",
)
@click.option(
    "--expert-substitution",
    is_flag=True,
    help="Keep experts that are constants (MoNE) so, in the layout of vLLM's open pull request "
    "50415; transformers does not load it.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; must not exist.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default="what the terms are stored in",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Write matrices that are multiplied out in this dtype, and name it in config.json.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0 ...")
@click.option(
    "--trust-remote-code", is_flag=True, help="DANGEROUS: run code that the directory carries."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    dense: bool,
    expert_substitution: bool,
    output: Path,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write DIRECTORY, a checkpoint in mctk's format, in a form that loads without mctk.

    It may also be a name on the hub: owner/name, owner/name@revision.
    """
    if dense == expert_substitution:
        raise click.UsageError("say in which form: one of --dense and --expert-substitution")
    if output.exists():
        raise click.UsageError(f"{output} exists already; give another --output, or remove it")

    import torch
    from transformers.utils import logging

    from mctk.checkpoint import open_source
    from mctk.evaluate.loading import resolve_device
    from mctk.export import export
    from mctk.registry import load_plugins

    logging.set_verbosity_error()
    load_plugins().register_kinds()
    with progress(quiet) as tell:
        found = export(
            open_source(model).path,
            output,
            constants=expert_substitution,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            device=resolve_device(device),
            trust_remote_code=trust_remote_code,
            progress=tell,
            say=lambda text: None if quiet else click.echo(text, err=True),
        )
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(found)


def _print(found: Exported) -> None:
    from mctk.report.tables import count, size

    click.echo(
        f"{found.output}: {found.form}, {count(found.parameters)} parameters, "
        f"{size(found.nbytes)} (compressed: {size(found.compressed_bytes)}), "
        f"{found.modules} modules multiplied out"
        + (f", {found.constants} experts are constants" if found.constants else "")
    )
    difference = found.difference
    if difference is None:
        click.echo("Not run: no client that reads this layout is installed; see docs/export.md")
    else:
        click.echo(
            f"Logits of {difference.tokens} tokens differ from the compressed model's by "
            f"{difference.median:.2g} (median token) to {difference.largest:.2g}, relative; "
            f"rounding explains {difference.allowed:.2g} of the median; the same next token for "
            f"{difference.same_choice:.0%}"
        )
        if difference.largest > difference.allowed:
            click.echo(
                "Single tokens differ by more where rounding sends them to another expert; "
                "--dtype float32 shows that it is rounding"
            )
        if difference.skipping is not None:
            click.echo(
                "Compared without what it skips at run time; as it runs it differs by "
                f"{difference.skipping:.2g}"
            )
    for note in found.notes:
        click.echo(f"Note: {note}")
