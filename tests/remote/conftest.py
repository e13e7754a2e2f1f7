"""A look-alike of DeepSeek-MoE-16B on disk; its code is copied to a directory of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import save_remote
from tests.tiny_run import cache, mixtral, write_recipe  # noqa: F401 (fixtures)


@pytest.fixture(scope="session", autouse=True)
def code_goes_elsewhere(modules_cache: Path) -> None:
    """Every test here runs remote code."""


@pytest.fixture(scope="session")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_remote(tmp_path_factory.mktemp("remote") / "look-alike")
