"""NAEE (arXiv 2402.14800): fewer experts, and fewer computed. See docs/methods/naee.md.

- prune/naee (`prune.py`): the subset of experts without which a layer's output changes least, by
  the error of `loss.py` and the searches of `search.py`.
- prune/skip_experts (`skip.py`): at run time a token's second expert is skipped where it counts
  for little.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_naee.prune import Naee
from mctk_naee.skip import SkipExperts


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Naee(), SkipExperts()]
