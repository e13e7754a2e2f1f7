"""The gate's second half, left to whoever loads the result anyway: a comparison's evaluation.

`check_fresh_process` starts a process for each run; a comparison evaluates many runs in a process
that has computed none of them, so what loads there serves as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files import write_tensors
from ..models import EXPERTS_IMPLEMENTATION
from .gate import GateError

FILE, PASSED = "probe.safetensors", "probe.passed"


def keep_probe(state: Path, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Keeps the gate's sequence [1, T] and the logits [1, T, V] that the passes' terms gave.

    The number of threads is kept as well, since it moves last bits, and whoever checks may be
    started with another one.
    """
    (state / PASSED).unlink(missing_ok=True)
    threads = torch.tensor(torch.get_num_threads())
    write_tensors(state / FILE, {"ids": ids, "expected": expected, "threads": threads})


def check_probe(model: Any, state: Path) -> bool:
    """Holds a loaded model against what was kept, once: what is large is used up by that.

    The tensors may be met as they are mapped or once they are copied to aligned memory, as in
    `check_fresh_process`.

    Args:
        model: From `from_pretrained`, in the run's dtype; left as it is but for where its tensors
            lie.
        state: The run's state directory.

    Returns:
        Whether the model passed, now or when it was first loaded; no if nothing was kept.

    Raises:
        GateError: The loaded model gives other logits.
    """
    path = state / FILE
    if not path.exists():
        return (state / PASSED).exists()
    kept = load_file(str(path))
    ids, expected = kept["ids"].to(model.device), kept["expected"]
    usual = getattr(model.config, "_experts_implementation", None)
    before = torch.get_num_threads()
    if usual is not None:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    try:
        torch.set_num_threads(int(kept.get("threads", before)))
        logits = _logits(model, ids)
        if not torch.equal(logits, expected):
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.data = tensor.data.clone()
            logits = _logits(model, ids)
    finally:
        torch.set_num_threads(before)
        if usual is not None:
            model.set_experts_implementation(usual)
    if not torch.equal(logits, expected):
        worst = float((logits.float() - expected.float()).abs().max())
        raise GateError(f"from_pretrained in another process gives other logits (by {worst:.3g})")
    (state / PASSED).touch()
    path.unlink()
    return True


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.cpu()
