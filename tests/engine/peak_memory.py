"""Runs one recipe in a process of its own; prints its memory after imports and at its peak.

Usage: python peak_memory.py RECIPE CACHE
"""

from __future__ import annotations

import importlib
import json
import resource
import sys

import psutil
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401 (a run imports it too)
from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins


def main(recipe: str, cache: str) -> None:
    torch.set_num_threads(1)
    registry = load_plugins()
    loaded = load_recipe(recipe, registry=registry)
    # The gate's second half loads the model whole, in another process: left out for time. Its
    # first half, which streams the written files in this one, stays.
    engine = importlib.import_module("mctk.engine.finish")
    engine.check_fresh_process = lambda *arguments: {"fresh_process_equal": None}
    imported = psutil.Process().memory_info().rss
    [metrics] = run([loaded], registry, cache=cache)
    assert metrics["gate"]["streamed_equal"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"imported": imported, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
