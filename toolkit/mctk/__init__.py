"""mctk: a plugin-based compression toolkit for Mixture-of-Experts language models.

After `import mctk`, transformers' `from_pretrained` loads the checkpoints that mctk writes. The
import itself costs nothing: torch and transformers are imported when they are needed.
"""

from __future__ import annotations

from .hook import install

__all__ = ["__version__"]

install()


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("mctk")
    raise AttributeError(f"module 'mctk' has no attribute {name!r}")
