"""Imports run downwards, and plugins use the same door as a stranger's."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLKIT = ROOT / "toolkit" / "mctk"
PLUGINS = ROOT / "plugins"

# From the top down: a module imports from the lines below its own; inside a line without cycles.
LINES = [
    {"__main__"},
    {"cli"},
    {"api", "lm_eval", "tensors", "testing"},
    {"comparison", "export", "publish"},
    {"engine"},
    {"planning", "report", "evaluate", "decompose"},
    {"recipe", "contract", "hookspecs", "registry", "sweep", "checkpoint", "data"},
    {"models", "statistics", "runtime"},
    {"linalg", "terms"},
    {"dtypes", "errors", "files", "hook", "hub", "notes"},
]
# What a plugin may build on.
PUBLIC = {"decompose", "errors", "hookspecs", "linalg", "notes", "statistics", "terms"}


def imports(file, package):
    """Every module that a file names, wherever in the file, relative names made absolute."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module == "mctk":  # from mctk import decompose
                for alias in node.names:
                    yield node.lineno, f"mctk.{alias.name}"
            else:
                yield node.lineno, module


def ours():
    """Every (file, line, part it is in, part it imports) under toolkit/mctk."""
    for file in sorted(TOOLKIT.rglob("*.py")):
        place = file.relative_to(TOOLKIT)
        package = ".".join(("mctk", *place.parts[:-1]))
        part = place.parts[0].removesuffix(".py")
        for line, module in imports(file, package):
            names = module.split(".")
            if names[0] == "mctk" and part != "__init__":
                yield f"{place}:{line}", part, names[1] if len(names) > 1 else "__init__"


def line_of(part):
    found = [number for number, parts in enumerate(LINES) if part in parts]
    assert found, f"mctk.{part} stands on no line of the table in {Path(__file__).name}"
    return found[0]


def test_every_module_stands_on_a_line():
    for file in TOOLKIT.iterdir():
        if file.name != "__init__.py" and (file.suffix == ".py" or (file / "__init__.py").exists()):
            line_of(file.name.removesuffix(".py"))


def test_imports_run_downwards():
    upward = [
        f"{place} imports mctk.{imported}"
        for place, part, imported in ours()
        if imported != part and line_of(imported) < line_of(part)
    ]
    assert not upward, "\n".join(upward)


def test_no_cycle_inside_a_line():
    edges = {}
    for _, part, imported in ours():
        if imported != part and line_of(imported) == line_of(part):
            edges.setdefault(part, set()).add(imported)

    def reach(part, path):
        assert part not in path, f"cycle: {' -> '.join([*path, part])}"
        for below in sorted(edges.get(part, ())):
            reach(below, [*path, part])

    for part in sorted(edges):
        reach(part, [])


def test_the_table_reads_from_the_top_down():
    parts = [part for line in LINES for part in line]
    assert len(parts) == len(set(parts))


def plugin_names():
    return [path.name for path in sorted(PLUGINS.iterdir()) if (path / "__init__.py").exists()]


@pytest.mark.parametrize("plugin", plugin_names())
def test_a_plugin_imports_only_public_names(plugin):
    others = set(plugin_names()) - {plugin}
    for file in sorted((PLUGINS / plugin).rglob("*.py")):
        package = ".".join(file.relative_to(PLUGINS).parts[:-1])
        for line, module in imports(file, package):
            place = f"{file.relative_to(ROOT)}:{line}"
            names = module.split(".")
            assert names[0] not in others, f"{place} imports {module}, another plugin"
            if names[0] == "mctk":
                assert len(names) == 2 and names[1] in PUBLIC, f"{place} imports {module}"


def test_mctk_imports_no_plugin():
    for file in sorted(TOOLKIT.rglob("*.py")):
        package = ".".join(file.relative_to(TOOLKIT.parent).parts[:-1])
        for line, module in imports(file, package):
            assert module.split(".")[0] not in plugin_names(), f"{file}:{line} imports {module}"


def test_hook_specs_fit_one_screen():
    assert len((TOOLKIT / "hookspecs.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_relative_and_inner_imports_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "from . import a\nfrom ..b import c\ndef f():\n    from mctk import terms, cli\n"
    )
    found = [module for _, module in imports(file, "mctk.engine")]
    assert found == ["mctk.engine", "mctk.b", "mctk.terms", "mctk.cli"]
