"""`import mctk` is light, and registers us in whatever order things are imported.

That order 'mctk, then transformers' registers us is shown by every checkpoint that loads.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import importlib, sys
import mctk
importlib.reload(mctk)
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
assert mctk.__version__.count(".") == 2
try:
    mctk.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
"""
REGISTERED = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "mctk" in ALL_EXPERTS_FUNCTIONS
assert "mctk" in AUTO_QUANTIZATION_CONFIG_MAPPING and "mctk" in AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize(
    "code",
    [
        LIGHT,
        # The hook runs while `mctk.runtime` is being imported.
        f"import mctk.runtime\n{REGISTERED}",
        # There is nothing to hook any more.
        f"import transformers.quantizers.auto, mctk\n{REGISTERED}",
    ],
    ids=["light", "runtime first", "mctk last"],
)
def test_import(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
