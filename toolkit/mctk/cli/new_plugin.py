"""`mctk new-plugin`: the beginnings of a package with one method, which work at once."""

from __future__ import annotations

import ast
import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path

import click

from mctk.errors import UserError
from mctk.hookspecs import SPEC, STAGES
from mctk.registry import load_plugins

EPILOG = """\b
Stages, and the method that each one starts with:
  allocate    shares a budget out: one step more for every bank in turn
  merge       experts share a base: their mean by use, and what is left of each
  decompose   low rank: an SVD weighted by the inputs' energy
  prune       fewer experts: those with the least output go
  compensate  adds terms: low rank for what the steps before lost
  quantize    fewer bits: rounding to nearest in groups
  distill     better values: each matrix scaled to be nearest to the original

\b
Examples:
  mctk new-plugin my_svd --stage decompose
  cd mctk-my-svd && pip install -e '.[test]' && pytest
  mctk run recipe.yaml --model MODEL  # with steps: [{decompose: my_svd, size: auto}]

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


# What the method's own test hands the kit beside its name: a stage that mends wants a loss first.
_LOSS = '[{"decompose": "svd", "size": {"keep": 0.6}}]'
_SETTINGS = {"compensate": f", before={_LOSS}", "distill": f", before={_LOSS}"}


@click.command(epilog=EPILOG)
@click.argument("name")
@click.option(
    "--stage", type=click.Choice(STAGES), required=True, help="What the method does to a layer."
)
@click.option("-o", "--output", metavar="DIR", help="Directory to make (default: mctk-NAME, here).")
def command(name: str, stage: str, output: str | None) -> None:
    """Write an installable package with one method, called NAME in recipes."""
    files = plugin_files(name, stage)
    _check_free(name, stage)
    directory = Path(output or _distribution(name)).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; name another with --output")
    for file, text in files.items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    click.echo(
        f"{directory}: a plugin with the method {stage}/{name}\n\n"
        f"  cd {directory}\n  pip install -e '.[test]'\n  pytest\n"
        f"  mctk plugins show {stage}/{name}"
    )


def plugin_files(name: str, stage: str) -> dict[str, str]:
    """The files of a plugin by their paths in its directory.

    Args:
        name: The method's name.
        stage: Its stage.

    Raises:
        UserError: The name is none for a method, or for its class.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        meant = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        hint = meant if re.fullmatch(r"[a-z]\w*", meant) else "my_svd"
        raise UserError(f"NAME: '{name}' should be of a-z, 0-9 and _, such as {hint}")
    kind = "".join(word.capitalize() for word in name.split("_"))
    module = _template(f"{stage}.py")
    if keyword.iskeyword(name) or keyword.iskeyword(kind):
        raise UserError(f"NAME: '{name}' is a word of Python; choose another")
    taken = _names_in(module) & {kind, f"{kind}Options"}
    if taken:
        raise UserError(f"NAME: '{name}' makes a class {taken.pop()}, which the module imports")
    words = {
        "METHOD": name,
        "STAGE": stage,
        "PLUGIN": name,
        "MODULE": f"mctk_{name}",
        "DISTRIBUTION": _distribution(name),
        "CLASS": kind,
        "RECIPE": _RECIPES[stage].replace("@METHOD@", name),
        "SPEC": str(SPEC),
        "SETTINGS": _SETTINGS.get(stage, ""),
    }
    files = {
        "pyproject.toml": _template("pyproject.toml"),
        "README.md": _template("README.md"),
        f"mctk_{name}.py": module,
        f"tests/test_{name}.py": _template("test.py"),
    }
    return {
        path: re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)
        for path, text in files.items()
    }


def _names_in(template: str) -> set[str]:
    """What a module imports or reads under its name."""
    tree = ast.parse(re.sub(r"@[A-Z]+@", "_", template))
    nodes = list(ast.walk(tree))
    imported = {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    return imported | {node.id for node in nodes if isinstance(node, ast.Name)}


def _check_free(name: str, stage: str) -> None:
    """Names that are installed already would clash.

    Raises:
        UserError: The stage has such a method, or there is such a plugin or module.
    """
    registry = load_plugins()
    for method in registry.methods(stage):
        if method.name == name:
            owner = registry.plugin_of(method)
            raise UserError(
                f"NAME: {stage}/{name} is a method of plugin '{owner.name}'; choose another"
            )
    if name in [plugin.name for plugin in registry.plugins()]:
        raise UserError(f"NAME: there is a plugin '{name}' already; choose another")
    if importlib.util.find_spec(f"mctk_{name}") is not None:
        raise UserError(f"NAME: there is a module mctk_{name} already; choose another")


def _distribution(name: str) -> str:
    return f"mctk-{name.replace('_', '-')}"


def _template(file: str) -> str:
    folder = resources.files("mctk") / "templates" / "plugin"
    return (folder / f"{file}.template").read_text(encoding="utf-8")
