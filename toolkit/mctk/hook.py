"""Registers our checkpoint format with transformers as soon as that is imported, not sooner.

`import mctk` costs milliseconds: neither torch nor transformers is imported here. A finder waits
for `transformers.quantizers.auto`, where formats are registered, and every use of a model imports
that module.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _RegisteringLoader(Loader):
    """Runs a module's own loader, then registers us."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        # Whatever else is asked of a loader (get_source, get_data ...).
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """Finds `TARGET` as the other finders do, and wraps its loader."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _register() -> None:
    importlib.import_module("mctk.runtime.quantizer")


def install() -> None:
    """Registers us now if transformers is loaded, else as soon as it is; may be called again."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
