"""Checkpoints of every family, and fresh processes that load all of them at once.

Starting Python with transformers takes seconds, so there are three processes in all: this one
writes, one loads with `import mctk` and one without; tests read what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import families  # noqa: E402
from compression import compress_mixed, write  # noqa: E402

BFLOAT16 = ("mixtral", "gpt_oss", "deepseek_v3", "llama")


def run_fresh(script: str, directory: Path, *arguments: str) -> dict[str, str]:
    """Runs a script of this directory in a new process; returns check → "ok" or what it saw."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH="")
    result = subprocess.run(
        [sys.executable, str(HERE / script), str(directory), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One compressed checkpoint per family, with tensors and logits of the model in memory."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in [*families.FAMILIES, "llama"]:
        model = families.tiny(family, **({} if family == "gpt_oss" else {"num_hidden_layers": 3}))
        if family != "llama":
            model.set_experts_implementation("mctk")
        described = compress_mixed(model)
        write(model, described, root / family)
        saved = {"logits": _logits(model), "tensors": model.state_dict()}
        torch.save(saved, root / family / "expected.pt")
        if family in BFLOAT16:
            kept = tuple(model._get_dtype_plan(torch.bfloat16))  # routers of some families
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point() and not name.endswith(kept):
                    parameter.data = parameter.data.bfloat16()
            torch.save(_logits(model), root / family / "bfloat16.pt")
    return root


@pytest.fixture(scope="session")
def loaded(checkpoints: Path) -> dict[str, str]:
    """What a fresh process with `import mctk` found."""
    return run_fresh("fresh_load.py", checkpoints)


@pytest.fixture(scope="session")
def plain(checkpoints: Path) -> dict[str, str]:
    """What plain transformers says to each checkpoint."""
    return run_fresh("fresh_plain.py", checkpoints)


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(families.token_ids()).logits
