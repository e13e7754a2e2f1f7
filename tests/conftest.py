"""Settings of every test: no network, one thread, slow tests only when asked for."""

import gc
import os
import shutil
import tempfile

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Where transformers copies remote code before it runs it: not the user's cache. One place for all
# tests of a process, and for the processes that it starts: the package is imported once.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="mctk-modules-")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan says of the disk does not depend on the machine that tests it."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**15))


@pytest.fixture(scope="session")
def modules_cache() -> Path:
    """Where transformers copies remote code to."""
    return Path(os.environ["HF_MODULES_CACHE"])


def pytest_collection_finish():
    # A streamed model collects garbage after each layer: not among what libraries hold for good.
    gc.freeze()


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
