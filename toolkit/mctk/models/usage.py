"""Which linear layers a module's own code does not simply call.

A linear layer can be replaced by terms if all that happens to it is that it is called. Some code
reads the matrix itself, as the selective scan of Mamba does with that of its step sizes; no terms
can stand there, and the matrix is no bank. The code of the class says so, not its name. What stands
under an `if` does not count: remote code of 2024 reads in one branch (`pretraining_tp`) what it
calls in the other. Is such a branch taken, no token will have reached the layer, and that is said.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

# What may be asked of a matrix without reading it.
_FACTS = {"dtype", "device", "shape", "size"}


def reads_matrix(layer: nn.Module, path: str) -> bool:
    """Whether the module around a linear layer reads its matrix or bias instead of calling it.

    Args:
        layer: The decoder layer.
        path: The linear layer's path in it.
    """
    parent, _, name = path.rpartition(".")
    cls: Any = type(layer.get_submodule(parent))
    return name in _read_by(cls)


@functools.cache
def _read_by(cls: Any) -> frozenset[str]:
    """The attributes of a class whose `weight` or `bias` its methods read."""
    if cls.__module__.startswith("torch."):
        return frozenset()
    found: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made at run time, or without its source
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name != "__init__":
                found |= _read_in(method)
    return frozenset(found)


def _read_in(method: ast.FunctionDef) -> set[str]:
    above = {id(child): node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    found = set()
    for node in ast.walk(method):
        if not (isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")):
            continue
        owner, around = node.value, above[id(node)]
        if _conditional(node, above):
            continue
        if not (isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name)):
            continue
        # Handed on by keyword it is for a fused kernel that computes what the calls do otherwise.
        harmless = isinstance(around, ast.keyword | ast.Compare) or (
            isinstance(around, ast.Attribute) and around.attr in _FACTS
        )
        if owner.value.id == "self" and not harmless:
            found.add(owner.attr)
    return found


def _conditional(node: ast.AST, above: dict[int, ast.AST]) -> bool:
    """Whether a node of a method stands under an `if` (its test apart)."""
    while id(node) in above:
        around = above[id(node)]
        if isinstance(around, ast.If) and node is not around.test:
            return True
        node = around
    return False
