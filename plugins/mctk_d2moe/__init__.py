"""D²-MoE (arXiv 2502.17298): shared bases, low-rank deltas. See docs/methods/d2moe.md.

Three steps, each a method that stands alone:

- merge (`merging.py`): every expert matrix becomes a base, shared by its cluster, plus a residual.
  The bases themselves are in `base.py`, clusters in `clusters.py`, the number of bases in
  `auto.py`.
- decompose (`delta.py`): the residuals become low-rank factors, some of them shared.
- prune (`prune.py`): the bases lose intermediate channels, for good or at run time.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_d2moe.delta import DeltaSvd
from mctk_d2moe.merges import FisherMerge, FrequencyMerge, Mean, RandomMerge, RegMean, Ties
from mctk_d2moe.prune import SemiDynamic


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    merges: list[Method] = [
        FisherMerge(),
        Mean(),
        FrequencyMerge(),
        RegMean(),
        Ties(),
        RandomMerge(),
    ]
    return [*merges, DeltaSvd(), SemiDynamic()]
