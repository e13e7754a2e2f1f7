"""NAEE (arXiv 2402.14800): fewer experts, and fewer computed. See docs/methods/naee.md.

Sections are those of the ACL 2024 text.

- prune/naee (`prune.py`, section 3.2): the subset of experts without which a layer's output changes
  least, by the error of `loss.py` and the searches of `search.py`.
- prune/skip_experts (`skip.py`, section 3.3): at run time a token's second expert is skipped where
  it counts for little.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_naee.prune import Naee
from mctk_naee.skip import SkipExperts


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [Naee(), SkipExperts()]
