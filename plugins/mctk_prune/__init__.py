"""Expert pruning: experts that matter least leave a layer, or become a constant.

A method here is a score for each expert (`math`) and nothing else: which experts go, what their
number costs and what is left of the layer is the same for all (`choice`, `selection`). `mone` puts
an expert's mean output in its place. Which paper has which score: docs/methods/prune.md.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_prune.methods import Ean, Frequency, Random, Reap, RouterWeight
from mctk_prune.mone import Mone


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Random(), Frequency(), RouterWeight(), Ean(), Reap(), Mone()]
