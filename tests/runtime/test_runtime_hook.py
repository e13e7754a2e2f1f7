"""`import mctk` is light, and registers us in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = """
import sys
import mctk
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
assert mctk.__version__.count(".") == 2
try:
    mctk.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
REGISTERED = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "mctk" in ALL_EXPERTS_FUNCTIONS
assert "mctk" in AUTO_QUANTIZATION_CONFIG_MAPPING and "mctk" in AUTO_QUANTIZER_MAPPING
"""


@pytest.mark.parametrize(
    "imports",
    [
        LIGHT,
        "import mctk, importlib; importlib.reload(mctk); import transformers.quantizers.auto",
        "import mctk.runtime",
        "import transformers.modeling_utils, mctk",
    ],
    ids=["first", "reloaded", "runtime", "last"],
)
def test_registered_in_every_order(imports):
    result = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{REGISTERED}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
