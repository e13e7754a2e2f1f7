"""mctk: a plugin-based compression toolkit for Mixture-of-Experts language models.

    import mctk

    run = mctk.compress("path/to/model", recipe="d2moe_mixtral", output="runs/small")
    model = run.load()

After `import mctk`, transformers' `from_pretrained` loads the checkpoints that mctk writes. The
import itself costs nothing: torch and transformers are imported when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hook import install

if TYPE_CHECKING:
    from .api import CompressedModel, compare, compress, load, plan
    from .tensors import apply, method

__all__ = [
    "CompressedModel",
    "__version__",
    "apply",
    "compare",
    "compress",
    "load",
    "method",
    "plan",
]

# Where a public name stands; its module is imported when it is first asked for.
_PLACES = {
    **dict.fromkeys(("CompressedModel", "compare", "compress", "load", "plan"), "api"),
    **dict.fromkeys(("apply", "method"), "tensors"),
}

install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mctk")
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    raise AttributeError(f"module 'mctk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
