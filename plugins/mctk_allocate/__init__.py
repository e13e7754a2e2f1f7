"""Sharing a budget over layers and banks. See docs/methods/allocate.md."""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_allocate.methods import ByLoss, ByScore, Uniform
from mctk_allocate.truncation import TruncationLoss


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Uniform(), ByLoss(), ByScore(), TruncationLoss()]
