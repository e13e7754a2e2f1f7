"""Commands are run in this process, on a tiny random Mixtral."""

from __future__ import annotations

import pytest
from mctk.cli import main

from tests.tiny_run import mixtral, write_recipe  # noqa: F401 (fixtures)


@pytest.fixture
def mctk(capsys, monkeypatch, tmp_path):
    """Runs a command; returns exit code, stdout and stderr."""
    monkeypatch.setenv("MCTK_CACHE", str(tmp_path / "cache"))

    def mctk(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return mctk


@pytest.fixture
def short(tmp_path):
    """A text that is too short for any calibration, beside the recipe."""
    (tmp_path / "short.txt").write_text("A text of a few words.")


@pytest.fixture
def refused(mctk):
    """Runs a command that must end with one line and exit code 2; returns the line."""

    def refused(*arguments: object) -> str:
        code, out, err = mctk(*arguments)
        assert code == 2, (out, err)
        assert out == ""
        [line] = err.splitlines()
        assert line.startswith("Error: ")
        return line

    return refused
