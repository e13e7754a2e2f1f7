"""Sharing a budget over layers and banks: `uniform` and `by_loss`. See docs/methods/allocate.md."""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_allocate.methods import ByLoss, Uniform


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Uniform(), ByLoss()]
