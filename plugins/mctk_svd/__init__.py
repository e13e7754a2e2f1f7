"""Singular value decompositions: plain, FWSVD and ASVD. See docs/methods/svd.md."""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_svd.methods import Asvd, Fwsvd, Svd


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Svd(), Fwsvd(), Asvd()]
