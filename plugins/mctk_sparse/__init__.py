"""Fewer entries, fewer channels: magnitude, Wanda, channel pruning. See docs/methods/sparse.md.

The page says which section and equation of a paper each piece is, and what differs.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_sparse.channels import Channels
from mctk_sparse.entries import Magnitude, Wanda


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Magnitude(), Wanda(), Channels()]
