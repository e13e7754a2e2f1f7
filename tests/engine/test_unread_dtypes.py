"""Tensors that transformers does not read go through a run in whatever dtype they are."""

from __future__ import annotations

import torch
from mctk.checkpoint import Source
from mctk.dtypes import torch_dtypes
from mctk.engine import run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny_run import save_mixtral

FILE = "model.safetensors"


def test_unread_tensors_of_every_dtype_are_copied(write_recipe, cache, tmp_path):
    """F8_E8M0 (scales that belong to no weight) and U16 among them."""
    source = save_mixtral(tmp_path / "source", shard="1GB")
    added = {
        f"model.extra.{name}": (torch.arange(8 * dtype.itemsize) % 2).to(torch.uint8).view(dtype)
        for name, dtype in torch_dtypes().items()
    }
    assert {"model.extra.F8_E8M0", "model.extra.U16"} < added.keys()
    save_file(load_file(source / FILE) | added, source / FILE, {"format": "pt"})
    recipe = write_recipe(
        model=str(source),
        steps=[{"decompose": "svd", "targets": "experts.*", "size": {"keep": 0.7}}],
        budget=None,
        calibration=None,
        gate=True,
    )
    registry = load_plugins()
    metrics = run([load_recipe(recipe, registry=registry)], registry, cache=cache)[0]
    assert metrics["gate"]["fresh_process_equal"]
    [part] = metrics["unread"]["parts"]
    assert (part["tensors"], part["kept"]) == (len(added), True)
    assert part["bytes"] == sum(tensor.nbytes for tensor in added.values())
    output = tmp_path / "out"
    found = Source(output)
    for name, tensor in added.items():
        info = found.tensors[name]
        assert info.dtype == name.removeprefix("model.extra.")
        with safe_open(str(output / info.file), framework="pt") as file:
            copied = file.get_tensor(name)
        assert copied.dtype == tensor.dtype
        assert torch.equal(copied.view(torch.uint8), tensor.view(torch.uint8))
