"""`mctk report`: finished runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mctk.errors import UserError

METRICS = "metrics.json"


@click.command(epilog="Example:\n\n  mctk report runs/* --format csv")
@click.argument("directories", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--format",
    "form",
    default="md",
    show_default=True,
    type=click.Choice(["md", "json", "csv"]),
    help="Markdown rounds; JSON and CSV have every digit.",
)
def command(directories: tuple[str, ...], form: str) -> None:
    """Print finished runs, DIR..., in one table below the model that they started from.

    Columns: parameters stored and active, bytes, perplexity of each text, accuracy of each task.
    Each run's own report.md says more. Of several directories those without a finished run are
    named and passed over.
    """
    from mctk.report import label_of, side_by_side

    if len(directories) > 1:
        finished = tuple(
            d for d in directories if Path(d).is_file() or (Path(d) / METRICS).is_file()
        )
        for directory in sorted({*directories} - {*finished}):
            click.echo(
                f"{directory}: passed over: no finished run ({METRICS} is missing)", err=True
            )
        if not finished:
            raise UserError("none of these directories holds a finished run")
        directories = finished
    runs = [_metrics(Path(directory)) for directory in directories]
    labels = [label_of(metrics) for metrics in runs]
    # Runs that differ in an option only would look alike: then each bears its directory's name.
    labels = [
        f"{label} ({Path(directory).resolve().name})" if labels.count(label) > 1 else label
        for label, directory in zip(labels, directories, strict=True)
    ]
    table = side_by_side(runs, labels)
    click.echo({"md": table.markdown, "json": table.json, "csv": table.csv}[form]())


def _metrics(directory: Path) -> dict[str, Any]:
    file = directory / METRICS if directory.is_dir() else directory
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no {METRICS}; is it a finished run?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if not isinstance(metrics, dict):
        raise UserError(f"{file}: is no JSON object")
    return metrics
