"""A conformance kit for methods: one call tries a method on tiny models of several families.

    from mctk.testing import assert_conforms

    def test_my_method():
        assert_conforms("decompose/my_method")

What it checks is listed in docs/write_a_plugin.md, and in the modules `calls`, `runs` and
`allocators`. The methods that ship with mctk pass the same kit.
"""

from .kit import Conformance, Finding, assert_conforms, check_method
from .models import FAMILIES, save_tiny

__all__ = [
    "FAMILIES",
    "Conformance",
    "Finding",
    "assert_conforms",
    "check_method",
    "save_tiny",
]
