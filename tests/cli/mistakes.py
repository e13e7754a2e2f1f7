"""Mistakes in a recipe or model that `plan` and `run` refuse alike, before weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

STEP = {"decompose": "svd_llm"}

# What is changed in the recipe, and what the one line says; {file} is the recipe's path.
IN_RECIPE = {
    "wrong key": (
        {"evalute": {}},
        "{file}:15: key evalute: unknown key (did you mean 'evaluate'?)",
    ),
    "wrong key below": (
        {"budget": {"remove": 0.4, "off": "experts"}},
        "{file}:11: key budget.off: unknown key (did you mean 'of'?)",
    ),
    "wrong method": (
        {"steps": [{"decompose": "svd_lm"}]},
        "{file}:13: key steps.0.decompose: no method 'svd_lm' for stage 'decompose' "
        "(did you mean 'svd_llm'?)",
    ),
    "wrong option": (
        {"steps": [{**STEP, "options": {"rank_multiples": 8}}]},
        "{file}:15: key steps.0.options.rank_multiples: unknown option of decompose/svd_llm "
        "(did you mean 'rank_multiple'?)",
    ),
    "option's type": (
        {"steps": [{**STEP, "options": {"rank_multiple": "many"}}]},
        "{file}:15: key steps.0.options.rank_multiple: should be a valid integer, got \"many\"",
    ),
    "unknown bank": (
        {"steps": [{**STEP, "targets": "expert.*"}]},
        "{file}:14: key steps.0.targets: no bank of the chosen layers matches expert.*",
    ),
    "layer too many": (
        {"steps": [{**STEP, "layers": "0-3"}]},
        "{file}:14: key steps.0.layers: there is no layer 3; the last is 2",
    ),
    "budget too tight": (
        {"budget": {"remove": 0.98}},
        "{file}:10: key budget: at most",
    ),
    "no calibration": (
        {"calibration": None},
        "calibration is missing; the steps need",
    ),
    "too little text": (
        {"calibration": {"text": "short.txt", "sequences": 100, "length": 128}},
        "calibration text 'short' gives ",
    ),
    "no text": (
        {"calibration": {"text": "nothing/*.txt"}},
        "text: no file matches 'nothing/*.txt'",
    ),
    "missing model": ({"model": "/no/such/model"}, "{file}:1: key model: there is no directory"),
}

each_in_recipe = pytest.mark.parametrize(
    ("change", "message"), IN_RECIPE.values(), ids=IN_RECIPE.keys()
)


def damage(model: Path, copy: Path, how: str) -> tuple[Path, str]:
    """Copies a model with one thing wrong; returns the copy and what must be said of it."""
    shutil.copytree(model, copy)
    file = sorted(copy.glob("*.safetensors"))[0]
    if how == "truncated shard":
        file.write_bytes(file.read_bytes()[:-100])
        return copy, f"{file}: truncated: tensor "
    if how == "missing shard":
        file.unlink()
        return copy, f"{file}: the file is missing"
    if how == "config contradicts":
        config = copy / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
        return copy, str(config)
    assert how == "pickle"
    for path in [*copy.glob("*.safetensors"), copy / "model.safetensors.index.json"]:
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    return copy, "has weights only as pickle (pytorch_model.bin)"


each_damage = pytest.mark.parametrize(
    "how", ["truncated shard", "missing shard", "config contradicts", "pickle"]
)
