"""`mctk eval`: perplexity and lm-eval tasks of one checkpoint, or of two side by side."""

from __future__ import annotations

import json
import re
from glob import has_magic
from pathlib import Path
from typing import Any

import click

from mctk.cli.progress import progress
from mctk.errors import UserError

EPILOG = """\b
Examples:
  mctk eval runs/small --text 'books/*.txt' --length 2048
  mctk eval runs/small --dataset wikitext2 --baseline mistralai/Mixtral-8x7B-v0.1
  mctk eval runs/small --tasks arc_easy,hellaswag --batch-size 16
"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME=]GLOB",
    help="Local .txt, .jsonl or .parquet files whose perplexity is measured; quote a glob. May be "
    "repeated.",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="NAME",
    help="wikitext2, ptb or c4 as papers use them, or owner/name[@revision] on the hub: the test "
    "split. May be repeated.",
)
@click.option(
    "--length", default=2048, show_default=True, type=click.IntRange(2), help="Tokens of a window."
)
@click.option("--windows", type=click.IntRange(1), help="At most so many windows of each text.")
@click.option("--tasks", default="", metavar="A,B", help="lm-eval tasks, groups or globs.")
@click.option(
    "--task-path",
    "task_paths",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="A directory with lm-eval tasks of your own.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples in a task's prompt.")
@click.option("--limit", type=click.IntRange(1), help="Documents of each task, for a smoke test.")
@click.option(
    "--batch-size",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Windows, or a task's requests, at a time.",
)
@click.option(
    "--streamed/--in-memory",
    default=None,
    help="One decoder layer in memory at a time, or the whole model; by default as it fits. "
    "Tasks need the whole model.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda:0 ...")
@click.option(
    "--dtype",
    default="auto",
    show_default="the checkpoint's",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of computation.",
)
@click.option("--baseline", metavar="MODEL", help="Measure this as well and compare on each text.")
@click.option("--seed", type=int, help="Of few-shot examples and of the bootstrap.")
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="DANGEROUS: run Python code that comes with the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str,
    texts: tuple[str, ...],
    datasets: tuple[str, ...],
    length: int,
    windows: int | None,
    tasks: str,
    task_paths: tuple[str, ...],
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    streamed: bool | None,
    device: str,
    dtype: str,
    baseline: str | None,
    seed: int | None,
    trust_remote_code: bool,
    as_json: bool,
    output: Path | None,
    quiet: bool,
) -> None:
    """Measure MODEL: perplexity on texts, accuracy on tasks.

    MODEL is a directory, or a name on the hub: owner/name, owner/name@revision.

    Original and compressed checkpoints are treated alike. Perplexity is token-level over windows
    of --length tokens that do not overlap, the protocol of the compression papers: a figure is
    comparable only with the same tokenizer, text and window. With --baseline, both models see the
    same windows and the difference gets a 95 % interval (paired bootstrap).
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not texts and not datasets and not names:
        raise click.UsageError("give something to measure: --text, --dataset or --tasks")
    for given, flag in ((limit, "--limit"), (num_fewshot, "--num-fewshot")):
        if given is not None and not names:
            raise click.UsageError(f"{flag} has no effect without --tasks")
    if task_paths and not names:
        raise click.UsageError("--task-path has no effect without --tasks")

    from transformers.utils import logging

    from mctk.api import measure

    logging.set_verbosity_error()
    sets = [
        {"name": name, "length": length, "windows": windows, **source}
        for name, source in _sources(texts, datasets)
    ]
    with progress(quiet) as tell:
        found = measure(
            model,
            perplexity=sets,
            tasks=names,
            limit=limit,
            baseline=baseline,
            device=device,
            dtype=dtype,
            streamed="auto" if streamed is None else streamed,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
            task_path=task_paths,
            seed=seed,
            trust_remote_code=trust_remote_code,
            report=tell,
        )
    if output is not None:
        from mctk.files import write_json

        write_json(output, found)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    for side in ("model", "baseline"):
        for warning in found.get(side, {}).get("warnings", []):
            click.echo(f"Warning: {side}: {warning}", err=True)


def _sources(texts: tuple[str, ...], datasets: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Names and sources of all texts; a name is the file's, or the directory's of a glob."""
    found: dict[str, dict[str, Any]] = {}
    for given in texts:
        name, equals, pattern = given.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name) or Path(given).exists():
            path = Path(given)
            name, pattern = path.stem, given
            if has_magic(name):
                name = path.parent.name if not has_magic(path.parent.name) else ""
            name = name or "text"
        if name in found:
            raise UserError(f"two texts are called '{name}'; name them: --text NAME={pattern}")
        found[name] = {"text": [pattern]}
    for dataset in dict.fromkeys(datasets):
        if dataset in found:
            raise UserError(f"a text is called '{dataset}' like the dataset; give it another name")
        found[dataset] = {"dataset": dataset}
    return list(found.items())


def _print(found: dict[str, Any]) -> None:
    """Prints Markdown tables, and how the figures came about."""
    from mctk.report.parts import perplexity_table, tasks_table
    from mctk.report.tables import duration

    baseline, model = found.get("baseline"), found["model"]
    for table in (
        perplexity_table(baseline, model, found.get("paired"), ("baseline", "model")),
        tasks_table(baseline, model, ("baseline", "model")),
    ):
        if table.rows:
            click.echo(table.markdown() + "\n")
    for side in ("model", "baseline"):
        if side in found:
            result = found[side]
            click.echo(
                f"{result['model']}: {result['mode']}, {result['dtype']} on {result['device']}, "
                f"{duration(result['seconds'])}"
            )
