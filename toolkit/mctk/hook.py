"""Registers us with transformers as soon as that is imported, not sooner.

`import mctk` costs milliseconds: neither torch nor transformers is imported here. A finder waits
for two modules: `transformers.quantizers.auto`, where formats are registered, and every use of a
model imports it; and `transformers.dynamic_module_utils`, which loads code that checkpoints carry,
sooner than that (see `mctk.runtime.remote`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importlib.abc brings a good part of the standard library
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

FORMATS = "transformers.quantizers.auto"
REMOTE = "transformers.dynamic_module_utils"
_WRAPPED = "_mctk_wraps"


class _RegisteringLoader:
    """Runs a module's own loader, then registers us."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _TARGETS[module.__name__](module)

    def __getattr__(self, name: str) -> object:
        # Whatever else is asked of a loader (get_source, get_data ...).
        return getattr(self._loader, name)


class _Finder:
    """Finds the modules that we wait for as the other finders do, and wraps their loaders."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TARGETS or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
        return spec


def _register(module: ModuleType) -> None:
    importlib.import_module("mctk.runtime.quantizer")


def _mend_remote_code(module: ModuleType) -> None:
    """Tries remote code that imports names of old once more, with those names in place.

    transformers imports all remote code in one function, and only code that the user trusts.
    """
    load: Callable[..., type] = module.get_class_in_module
    if hasattr(load, _WRAPPED):
        return

    def get_class_in_module(class_name: str, module_path: Any, **options: Any) -> type:
        try:
            return load(class_name, module_path, **options)
        except ImportError as error:
            remote = importlib.import_module("mctk.runtime.remote")
            if not remote.is_old(error):
                raise
        with remote.old_names():
            return remote.mend(load(class_name, module_path, **options))

    setattr(get_class_in_module, _WRAPPED, load)
    module.get_class_in_module = get_class_in_module  # type: ignore[attr-defined]


_TARGETS = {FORMATS: _register, REMOTE: _mend_remote_code}


def install() -> None:
    """Registers us now where transformers is loaded, else as soon as it is; may be called again."""
    waiting = False
    for name, act in _TARGETS.items():
        if name in sys.modules:
            act(sys.modules[name])
        else:
            waiting = True
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
