"""A look-alike of DeepSeek-MoE-16B on disk; its code is copied to a directory of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families import save_remote
from tests.tiny_run import cache, mixtral, write_recipe  # noqa: F401 (fixtures)


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code before it runs it: here, and not into the user's cache."""
    import transformers.dynamic_module_utils

    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", place)  # for fresh processes
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
        if place in sys.path:
            sys.path.remove(place)


@pytest.fixture(scope="session")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_remote(tmp_path_factory.mktemp("remote") / "look-alike")
