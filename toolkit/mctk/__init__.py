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
    from .api import CompressedModel, compare, compress, load, measure, plan
    from .errors import UserError
    from .tensors import apply, method

    __version__: str

__all__ = [
    "CompressedModel",
    "UserError",
    "__version__",
    "apply",
    "compare",
    "compress",
    "load",
    "measure",
    "method",
    "plan",
]

# Where a public name stands; its module is imported when it is first asked for.
_API = ("CompressedModel", "compare", "compress", "load", "measure", "plan")
_PLACES = {
    **dict.fromkeys(_API, "api"),
    **dict.fromkeys(("apply", "method"), "tensors"),
    "UserError": "errors",
}

install()


if not TYPE_CHECKING:  # else a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("mctk")
        if name in _PLACES:
            return getattr(import_module(f".{_PLACES[name]}", __name__), name)
        raise AttributeError(f"module 'mctk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
