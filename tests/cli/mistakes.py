"""Mistakes in a recipe or model that `plan` and `run` refuse alike, before weights are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

STEP = {"decompose": "svd_llm"}

# What is changed in the recipe; what stands in the line that is wrong, or None where it is none of
# the recipe's; what the one line says, {at} being the place.
IN_RECIPE = {
    "wrong key": (
        {"evalute": {}},
        "evalute:",
        "{at}: key evalute: unknown key (did you mean 'evaluate'?)",
    ),
    "wrong key below": (
        {"budget": {"remove": 0.4, "ofs": "experts"}},
        "ofs:",
        "{at}: key budget.ofs: unknown key (did you mean 'of'?)",
    ),
    "wrong method": (
        {"steps": [{"decompose": "svd_lm"}]},
        "svd_lm",
        "{at}: key steps.0.decompose: no method 'svd_lm' for stage decompose "
        "(did you mean 'svd_llm'?)",
    ),
    "wrong option": (
        {"steps": [{**STEP, "options": {"rank_multiples": 8}}]},
        "rank_multiples:",
        "{at}: key steps.0.options.rank_multiples: unknown option of decompose/svd_llm "
        "(did you mean 'rank_multiple'?)",
    ),
    "option's type": (
        {"steps": [{**STEP, "options": {"rank_multiple": "many"}}]},
        "rank_multiple:",
        '{at}: key steps.0.options.rank_multiple: should be a valid integer, got "many"',
    ),
    "unknown bank": (
        {"steps": [{**STEP, "targets": "expert.*"}]},
        "targets:",
        "{at}: key steps.0.targets: no bank of the chosen layers matches expert.*",
    ),
    "layer too many": (
        {"steps": [{**STEP, "layers": "0-3"}]},
        "layers:",
        "{at}: key steps.0.layers: there is no layer 3; the last is 2",
    ),
    "option of a layer too many": (
        {"steps": [{"prune": "frequency", "options": {"protect": {77: [1]}}}]},
        "77:",
        "{at}: key steps.0.options.protect.77: there is no layer 77; the last is 2",
    ),
    "option of a layer left out": (
        {"steps": [{"prune": "frequency", "layers": 0, "options": {"protect": {1: [1]}}}]},
        "1:",
        "{at}: key steps.0.options.protect.1: has no effect: the step does not work on layer 1",
    ),
    "size beside a pattern": (
        {
            "budget": None,
            "steps": [{"prune": "magnitude", "size": {"keep": 0.6}, "options": {"pattern": "2:4"}}],
        },
        "keep:",
        "{at}: key steps.0.size.keep: 0.6 has no effect: with these options prune/magnitude has "
        "one size of experts.gate of layer 0; write {{keep: 0.5}}",
    ),
    "budget too tight": (
        {"budget": {"remove": 0.98}},
        "budget:",
        "{at}: key budget: at most",
    ),
    "no calibration": (
        {"calibration": None},
        None,
        "calibration is missing; the steps need",
    ),
    "too little text": (
        {"calibration": {"text": "short.txt", "sequences": 100, "length": 128}},
        "calibration:",
        "{at}: key calibration: calibration text 'short' gives ",
    ),
    "no text": (
        {"calibration": {"text": "nothing/*.txt"}},
        "nothing/*.txt",
        "{at}: key calibration.text: no file matches 'nothing/*.txt'",
    ),
    "no text in a mix": (
        {"calibration": {"mix": [{"dataset": "c4"}, {"text": "absent.jsonl"}]}},
        "absent.jsonl",
        "{at}: key calibration.mix.1.text: there is no file 'absent.jsonl'",
    ),
    "no evaluation text": (
        {"evaluate": {"perplexity": [{"text": "absent.txt", "name": "a"}]}},
        "absent.txt",
        "{at}: key evaluate.perplexity.0.text: there is no file 'absent.txt'",
    ),
    "evaluation text too short": (
        {"evaluate": {"perplexity": [{"text": "short.txt", "length": 64}]}},
        "text: short.txt",
        "{at}: key evaluate.perplexity.0: evaluation text 'short' has ",
    ),
    "missing model": (
        {"model": "/no/such/model"},
        "model:",
        "{at}: key model: there is no directory",
    ),
}

each_in_recipe = pytest.mark.parametrize(
    ("change", "written", "message"), IN_RECIPE.values(), ids=IN_RECIPE.keys()
)


def placed(recipe: Path, written: str | None, message: str) -> str:
    """The message with the recipe's file and the line in which something is written."""
    lines = recipe.read_text().splitlines()
    at = next((n for n, line in enumerate(lines, 1) if written and written in line), None)
    return message.format(at=f"{recipe}:{at}")


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
