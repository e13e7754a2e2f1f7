"""Experts merged into groups: M-SMoE, HC-SMoE, plain averages. See docs/methods/merge.md.

Every method says which experts form a group (`grouping.py`); what is the same for all, sizes, the
average and the terms, is in `merging.py`. M-SMoE is arXiv 2310.01334, section 3.1 and Algorithm 1;
HC-SMoE arXiv 2410.08589.
"""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_merge.methods import Average, HcSmoe, MSmoe


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [MSmoe(), HcSmoe(), Average()]
