"""Compressed checkpoints in forms that load without mctk."""

from .run import Exported, export

__all__ = ["Exported", "export"]
