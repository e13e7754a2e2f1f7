"""An environment as a user's: mctk from its wheel, nothing of the clone on the path.

The heavy libraries are those of the environment that runs the tests, on the path by a `.pth` file:
what is installed there in editable mode (mctk itself) is not seen, for its own `.pth` is not read.
Test modules import the fixtures that they use: `from tests.fresh_venv import fresh, wheel`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a source distribution holds, of which the wheel is made.
SOURCES = ("toolkit", "plugins", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in")
TEXTS = ("README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "demo")


@dataclass(frozen=True)
class FreshVenv:
    """A virtual environment.

    Attributes:
        path: Its directory.
    """

    path: Path

    def run(
        self,
        *command: object,
        cwd: Path | None = None,
        check: bool = True,
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment, such as "mctk", "python" or "pytest".

        Args:
            *command: Its name and arguments.
            cwd: Where; by default a directory outside of the clone.
            check: Whether it must end with exit code 0.
            env: Variables over this process's; MCTK_CACHE is in the environment's directory.
        """
        program, *arguments = map(str, command)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MCTK_PLUGINS")}
        ours = {
            "VIRTUAL_ENV": str(self.path),
            "PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "MCTK_CACHE": str(self.path / "cache"),
        }
        done = subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=cwd or self.path,
            env={**kept, **ours, **(env or {})},
            capture_output=True,
            text=True,
            timeout=540,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments: object) -> None:
        """Runs pip, without a network and without building elsewhere than here."""
        self.run("python", "-m", "pip", "-q", "--disable-pip-version-check", *arguments)

    def install(self, source: Path) -> None:
        """Installs a wheel or a source directory; what it depends on is there."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation")
        # Without --force-reinstall pip would take the clone's mctk, which it sees, for this one.
        self.pip("install", *offline, "--force-reinstall", source)


def build_wheel(into: Path) -> Path:
    """Builds mctk's wheel of a copy of the sources; returns the file."""
    source = into / "source"
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=LEFT_OUT)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source)
    for name in TEXTS:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    command = [*pip, *offline, "--wheel-dir", str(into), str(source)]
    subprocess.run(command, check=True, timeout=300)
    [wheel] = into.glob("mctk-*.whl")
    return wheel


def make_venv(path: Path) -> FreshVenv:
    """Makes an environment that sees this one's libraries, and installs nothing."""
    venv.create(path, with_pip=False, symlinks=True)
    made = FreshVenv(path)
    own = made.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(own.stdout.strip(), "outer.pth").write_text("\n".join(sorted(outer)) + "\n")
    return made


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mctk's wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> FreshVenv:
    """An environment with mctk; what a test installs beside it, it removes again."""
    made = make_venv(tmp_path_factory.mktemp("fresh") / "venv")
    made.install(wheel)
    return made
