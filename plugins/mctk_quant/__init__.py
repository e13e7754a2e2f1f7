"""Weights in fewer bits, packed. See docs/methods/quant.md, sources and differences too."""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_quant.methods import Rtn


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Rtn()]
