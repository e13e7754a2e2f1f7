"""`mctk new-plugin`: the beginnings of a package with one method, which work at once."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import click

from mctk.errors import UserError
from mctk.hookspecs import STAGES

EPILOG = """\b
Examples:
  mctk new-plugin my_svd --stage decompose
  cd mctk-my-svd && pip install -e . && pytest
  mctk run ../my_recipe.yaml          # steps: [{decompose: my_svd, size: auto}]

What it writes is small and complete: pyproject.toml with the entry point, one module with one
method, a test that tries the method on tiny models through whole runs, and a README. Change the
mathematics, and run the test. docs/write_a_plugin.md explains every hook."""
# How a recipe uses a method of a stage.
_RECIPES = {
    "allocate": "budget: {remove: 0.4, of: experts}\nallocate: {method: @METHOD@}\n"
    "steps:\n  - {decompose: svd, size: auto}",
    "merge": "budget: {remove: 0.4, of: experts}\nsteps:\n  - merge: @METHOD@\n"
    "  - {decompose: svd, size: auto}",
    "decompose": "budget: {remove: 0.4, of: experts}\n"
    "steps:\n  - {decompose: @METHOD@, size: auto}",
    "prune": "budget: {remove: 0.25, of: experts}\nsteps:\n  - {prune: @METHOD@, size: auto}",
    "compensate": "steps:\n  - {decompose: svd, size: {keep: 0.6}}\n  - compensate: @METHOD@",
    "quantize": "steps:\n  - quantize: @METHOD@",
    "distill": "steps:\n  - {decompose: svd, size: {keep: 0.6}}\n  - distill: @METHOD@",
}


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option(
    "--stage", type=click.Choice(STAGES), required=True, help="What the method does to a layer."
)
@click.option("-o", "--output", metavar="DIR", help="Directory to make (default: mctk-NAME, here).")
def command(name: str, stage: str, output: str | None) -> None:
    """Write an installable package with one method, called NAME in recipes."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"NAME: '{name}' should be of small letters, digits and _, such as my_svd")
    directory = Path(output or f"mctk-{name.replace('_', '-')}").expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; name another with --output")
    for file, text in plugin_files(name, stage).items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    click.echo(
        f"{directory}: a plugin with the method {stage}/{name}\n\n"
        f"  cd {directory}\n  pip install -e .\n  pytest\n  mctk plugins show {stage}/{name}"
    )


def plugin_files(name: str, stage: str) -> dict[str, str]:
    """The files of a plugin by their paths in its directory.

    Args:
        name: The method's name.
        stage: Its stage.
    """
    words = {
        "METHOD": name,
        "STAGE": stage,
        "PLUGIN": name,
        "MODULE": f"mctk_{name}",
        "DISTRIBUTION": f"mctk-{name.replace('_', '-')}",
        "CLASS": "".join(word.capitalize() for word in name.split("_")),
        "RECIPE": _RECIPES[stage].replace("@METHOD@", name),
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"mctk_{name}.py": f"{stage}.py",
        f"tests/test_{name}.py": "test.py",
    }
    return {file: _filled(template, words) for file, template in files.items()}


def _filled(template: str, words: dict[str, str]) -> str:
    """A template with its words put in."""
    folder = resources.files("mctk") / "templates" / "plugin"
    text = (folder / f"{template}.template").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)
