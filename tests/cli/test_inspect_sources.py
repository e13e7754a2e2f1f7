"""`mctk inspect` and `mctk plan` on sources with quantised weights and unread tensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.families import tiny
from tests.quantised_checkpoint import FILE, add_predictor, store_fp8
from tests.tiny_run import DEMO


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    tiny("deepseek_v3", vocab_size=4096).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    add_predictor(path, 3)
    store_fp8(path)
    return path


def test_inspect_counts_elements_and_the_bytes_of_the_files(mctk, source):
    found = json.loads(mctk("inspect", source, "--json")[1])
    tensors = load_file(source / FILE)
    weights = {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")}
    assert found["sizes"]["parameters"] == sum(t.numel() for t in weights.values())
    assert found["sizes"]["bytes"] == sum(t.nbytes for t in tensors.values())
    assert found["dequantised_bytes"] == 2 * found["sizes"]["parameters"]
    assert found["quantised"] == "FP8" and not found["compressed"]
    assert sum(found["parts"].values()) == found["sizes"]["parameters"]
    part = found["unread"]["multi-token prediction"]
    extra = {n: t for n, t in tensors.items() if ".layers.3." in n}
    assert part["parameters"] == sum(weights[n].numel() for n in extra if n in weights)
    assert part["bytes"] == sum(t.nbytes for t in extra.values())
    assert found["parts"]["multi-token prediction"] == part["parameters"]
    out = mctk("inspect", source)[1]
    assert "weights stored in FP8" in out and "multi-token prediction: 42 tensors" in out


def test_the_plan_says_it(mctk, refused, write_recipe, source):
    keys = {"model": str(source), "calibration": None, "budget": None}
    steps = [{"decompose": "svd", "targets": "experts.*", "size": {"keep": 0.7}}]
    code, out, _ = mctk("plan", write_recipe(steps=steps, **keys))
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert code == 0 and len(warnings) == 3
    assert "42 tensors of multi-token prediction layers" in warnings[0]
    assert "kept, dequantised" in warnings[0]
    assert "stores its weights in FP8" in warnings[1]
    assert "larger than the source's" in warnings[2]
    [line] = refused("plan", write_recipe(steps=steps, unread="leave", **keys)).splitlines()
    assert "unread" in line and "drop" in line
