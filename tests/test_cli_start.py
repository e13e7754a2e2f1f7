"""What the command line does before and around its commands."""

import subprocess
import sys

import click
import pytest
from mctk import cli
from mctk.errors import UserError

HEAVY = ("torch", "transformers", "pydantic", "datasets", "rich", "accelerate")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "code", ["import mctk", "import mctk.cli", "from mctk.cli import main\ntry: main(['--help'])"]
)
def test_starting_imports_nothing_heavy(code):
    if "try:" in code:
        code += "\nexcept SystemExit as done: assert done.code == 0"
    loaded = python(f"{code}\nimport sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert loaded.splitlines()[-1] == ""


def test_help_lists_every_command():
    text = python("from mctk.cli import main\ntry: main(['-h'])\nexcept SystemExit: pass")
    for name, line in cli.COMMANDS.items():
        assert name in text and line[:20] in text


def run(monkeypatch, arguments, effect=None):
    """Runs main() with a command `plan` that has an effect; returns the exit code."""

    @click.command()
    @click.pass_context
    def command(ctx):
        if isinstance(effect, BaseException):
            raise effect
        if effect:
            effect(ctx)

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda self, ctx, name: command)
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    return done.value.code


def test_a_users_error_is_one_line_and_two(monkeypatch, capsys):
    assert run(monkeypatch, ["plan"], UserError("r.yaml:3: key x: unknown")) == 2
    assert capsys.readouterr() == ("", "Error: r.yaml:3: key x: unknown\n")


def test_debug_may_stand_anywhere_and_shows_the_traceback(monkeypatch, capsys):
    for arguments in (["--debug", "plan"], ["plan", "--debug"]):
        assert run(monkeypatch, arguments, UserError("wrong")) == 2
        error = capsys.readouterr().err
        assert "Traceback" in error and error.endswith("Error: wrong\n")
    seen = []
    run(monkeypatch, ["plan", "--debug"], lambda ctx: seen.append(ctx.obj["debug"]))
    run(monkeypatch, ["plan"], lambda ctx: seen.append(ctx.obj["debug"]))
    assert seen == [True, False]


def test_a_bug_is_not_hidden(monkeypatch):
    def bug(ctx):
        raise ZeroDivisionError

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda *_: click.command()(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


@pytest.mark.parametrize(
    ("command", "message"),
    [("run", "Interrupted: the same command goes on from here.\n"), ("plan", "Interrupted.\n")],
)
def test_interrupted(monkeypatch, capsys, command, message):
    assert run(monkeypatch, [command], KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.lstrip() == message


def test_exit_codes(monkeypatch, capsys):
    assert run(monkeypatch, ["plan"]) == 0
    assert run(monkeypatch, ["plan"], lambda ctx: ctx.exit(3)) == 3
    assert run(monkeypatch, ["plan", "--nonsense"]) == 2
    assert "No such option" in capsys.readouterr().err


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["plugns"])
    assert done.value.code == 2
    assert "No such command 'plugns' (did you mean 'plugins'?)" in capsys.readouterr().err


def test_it_also_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "mctk", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "run" in done.stdout


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["mctk", "pl"], ["plain,plan", "plain,plugins"]),
        (["mctk", "--de"], ["plain,--debug"]),
        (["mctk", "run", "--dev"], ["plain,--device"]),
        (["mctk", "run", "d2moe_mix"], ["file,d2moe_mix", "plain,d2moe_mixtral"]),
        (["mctk", "compare", "compare_mix"], ["file,compare_mix", "plain,compare_mixtral"]),
        (["mctk", "run", "my/recipe"], ["file,my/recipe"]),
        (["mctk", "recipes", "show", "naee"], ["plain,naee_mixtral"]),
        (["mctk", "plugins", "show", "svd_"], ["plain,svd_llm"]),
        (["mctk", "plugins", "show", "decompose/asv"], ["plain,decompose/asvd"]),
        (["mctk", "no-such-command", "x"], []),
    ],
    ids=lambda value: " ".join(value[1:]) if value and value[0] == "mctk" else "",
)
def test_the_shell_completes(monkeypatch, capsys, words, offered):
    monkeypatch.setenv("_MCTK_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as done:
        cli.main([])
    assert done.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.split() == offered and not shown.err


def test_completing_commands_imports_none_of_them():
    code = (
        "import os, sys\n"
        "os.environ |= {'COMP_WORDS': 'mctk ', 'COMP_CWORD': '1'}\n"
        "os.environ['_MCTK_COMPLETE'] = 'bash_complete'\n"
        "from mctk.cli import COMMANDS, main\n"
        "try: main([])\nexcept SystemExit: pass\n"
        "print(*[m for m in sys.modules if m.startswith('mctk.cli.')])\nprint(len(COMMANDS))"
    )
    *commands, imported, count = python(code).splitlines()
    assert imported == "" and len(commands) == int(count)
