"""Loads a native checkpoint as a user without mctk does: a fresh process that never imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROGRAM = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, dtype = sys.argv[1:3]
for number, (path, again) in enumerate(json.load(open(folder + "/models.json"))):
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), output_loading_info=True
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        assert not info[kind], (path, kind, info[kind])
    model.eval()
    with torch.no_grad():
        logits = model(load_file(folder + "/ids.safetensors")["ids"], use_cache=False).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/logits-{number}.safetensors")
    if again:
        model.save_pretrained(again)
assert "mctk" not in sys.modules
"""


def plain_logits(
    checkpoints: Path | Sequence[Path],
    ids: torch.Tensor,
    dtype: str = "float32",
    save_again: Path | None = None,
) -> list[torch.Tensor]:
    """The logits [B, T, V] that plain transformers gives for checkpoints, in one process for all.

    Every tensor must be there, of the right shape, and none too many. transformers sums up experts
    in its own order, so the bits may differ from mctk's: compare with a tolerance.

    Args:
        checkpoints: A model directory, or several.
        ids: Token ids [B, T].
        dtype: The dtype to load and compute in.
        save_again: A directory to save the loaded models to, by `save_pretrained`, each under its
            own directory's name.
    """
    paths = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
    models = [(str(path), str(save_again / path.name) if save_again else "") for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids.contiguous()}, f"{folder}/ids.safetensors")
        Path(folder, "models.json").write_text(json.dumps(models))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder, dtype],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = [f"{folder}/logits-{number}.safetensors" for number in range(len(paths))]
        return [load_file(file)["logits"] for file in files]
