"""Banks and terms: a compressed layer is a sum of terms, and a pass rewrites terms.

A *bank* is a set of same-shaped weight matrices that are compressed together (the gate matrices
of one layer's experts, say). A *term* is one affine contribution to it; for every member e
``W_e x ≈ Σ_t term_t[e](x)``. This package knows how terms are counted, described in JSON,
multiplied out and applied; it depends on torch and on nothing else of ours but the errors.
"""

from mctk.terms.bank import Bank
from mctk.terms.dense import Bias, Dense
from mctk.terms.dynamic import DynamicDense
from mctk.terms.lowrank import LowRank
from mctk.terms.packing import PackedTensor, packed_bits
from mctk.terms.registry import kind, kinds, register_kind
from mctk.terms.removal import compact, drop_members, removed_members
from mctk.terms.rounding import pack
from mctk.terms.shape import BankShape
from mctk.terms.sizes import DENSE, SizeCurve, rank_settings
from mctk.terms.skip import ExpertSkip
from mctk.terms.sparse import Sparse, sparse_from_mask
from mctk.terms.term import Term, spec_bytes, spec_elements, spec_parameters

for _kind in (Dense, DynamicDense, LowRank, Sparse, Bias, ExpertSkip):
    register_kind(_kind)

__all__ = [
    "DENSE",
    "Bank",
    "BankShape",
    "Bias",
    "Dense",
    "DynamicDense",
    "ExpertSkip",
    "LowRank",
    "PackedTensor",
    "SizeCurve",
    "Sparse",
    "Term",
    "compact",
    "drop_members",
    "kind",
    "kinds",
    "pack",
    "packed_bits",
    "rank_settings",
    "register_kind",
    "removed_members",
    "sparse_from_mask",
    "spec_bytes",
    "spec_elements",
    "spec_parameters",
]
