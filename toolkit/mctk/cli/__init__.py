"""The `mctk` command. A command's module is imported when it is called: help waits for no torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from mctk.errors import MethodError, UserError, nearest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# A command and its line in `mctk --help`; module mctk.cli.<name> holds it as `command`,
# with _ for -.
COMMANDS = {
    "run": "Compress a model as a recipe says; goes on where it was stopped.",
    "compare": "Run many methods at many budgets on one calibration; one table.",
    "plan": "Check a recipe and show what it will cost, before weights are read.",
    "eval": "Measure a checkpoint: perplexity and lm-eval tasks.",
    "report": "Print finished runs side by side.",
    "export": "Write a compressed checkpoint in a form that loads without mctk.",
    "push": "Upload a finished result to the Hugging Face hub, with its model card.",
    "inspect": "Show what a checkpoint holds: layers, terms and sizes.",
    "plugins": "List the methods that recipes can name, and their options.",
    "recipes": "List the recipes that come with mctk; print one to start from.",
    "schema": "Print the JSON schema of recipes, for editors.",
    "new-plugin": "Write an installable package with one method, to start from.",
}


class _LazyGroup(click.Group):
    """Knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:  # the shell asks what could follow
                return None
            ctx.fail(f"No such command '{cmd_name}'{nearest(cmd_name, COMMANDS)}.")
        module = importlib.import_module(f"mctk.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=line)
            for name, line in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

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
        if isinstance(error, MethodError) and not debug:
            click.echo("--debug shows where in the plugin.", err=True)
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
