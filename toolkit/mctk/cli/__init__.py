"""The `mctk` command. A command's module is imported when it is called: help waits for no torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence

import click

from mctk.errors import UserError, nearest

# A command and its line in `mctk --help`; module mctk.cli.<name> holds it as `command`.
COMMANDS = {
    "run": "Compress a model as a recipe says; goes on where it was stopped.",
    "compare": "Run many methods at many budgets on one calibration; one table.",
    "plan": "Check a recipe and show what it will cost, before weights are read.",
    "eval": "Measure a checkpoint: perplexity and lm-eval tasks.",
    "report": "Print finished runs side by side.",
    "export": "Write a compressed checkpoint in a form that loads without mctk.",
    "inspect": "Show what a checkpoint holds: layers, terms and sizes.",
    "plugins": "List the methods that recipes can name, and their options.",
}


class _LazyGroup(click.Group):
    """Knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            ctx.fail(f"No such command '{cmd_name}'{nearest(cmd_name, COMMANDS)}.")
        command: click.Command = importlib.import_module(f"mctk.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mctk")
@click.option(
    "--debug", is_flag=True, help="Show tracebacks of errors; may stand anywhere in the command."
)
def cli(debug: bool) -> None:
    """Compresses Mixture-of-Experts language models as a recipe says."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for a user's error, 130 if interrupted.

    Args:
        arguments: What follows `mctk`; the process's own by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Taken out here rather than by click, so that people may add it to the end of any command.
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = cli.main(given, prog_name="mctk", standalone_mode=False, obj={"debug": debug})
    except UserError as error:
        if debug:
            traceback.print_exc()
        click.echo(f"Error: {error}", err=True)
        code = 2
    except OSError as error:  # a full disk, a path that cannot be: the machine's, not a bug
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror or error}", err=True)
        code = 2
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        resumes = given[:1] in (["run"], ["compare"])
        tail = ": the same command goes on from here." if resumes else "."
        click.echo(f"Interrupted{tail}", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
