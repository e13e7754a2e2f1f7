"""ResMoE (arXiv 2503.06881): a barycenter expert, compressed residuals. See docs/methods/resmoe.md.

The page says which piece of the paper and of its authors' code each method is, and what differs.

- merge (`merge.py`): every layer's experts become a free-support Wasserstein barycenter, in one
  order of neurons (`barycenter.py`), and what is left of each.
- prune (`prune.py`): the residuals keep their largest entries (`up`), or a low rank of all three
  matrices of an expert together (`joint_svd`). Each matrix by itself: decompose/svd.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_resmoe.merge import Wasserstein
from mctk_resmoe.prune import JointSvd, UnstructuredPruning


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Wasserstein(), UnstructuredPruning(), JointSvd()]
