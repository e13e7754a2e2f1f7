"""A process that loads checkpoints as a user does: nothing of what wrote them is in memory.

`python fresh.py` answers each line of JSON {"path": directory, "head": name of an Auto class,
"expected": file of "ids" and "logits"} by a line {"fresh": ..., "again": ...}: "works" or why not.
Many checkpoints share the process, as starting one takes longer than loading a tiny model.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import mctk  # noqa: F401

assert not {"torch", "transformers"} & set(sys.modules), "import mctk must not import these"

import torch  # noqa: E402
import transformers  # noqa: E402
from mctk.models import language_part  # noqa: E402
from mctk.runtime import restore_buffers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from serving import serve  # noqa: E402

torch.set_num_threads(1)


def load(path: str | Path, head: str):
    """The model by `from_pretrained`, its experts run by mctk; every tensor must have a place."""
    model, info = getattr(transformers, head).from_pretrained(
        path, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    found = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    assert not found, f"from_pretrained reports {found}"
    if any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("mctk")
    if hasattr(model.config, "auto_map"):
        restore_buffers(model)  # transformers leaves those of code of 2024 undefined
    return model.eval()


def check(model, expected: dict) -> None:
    """The logits are those of the streamed forward, bit by bit.

    Tensors are copied out of the file's mapping: there they lie at any offset, and matrix products
    round by the alignment.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        logits = language_part(model)[1](input_ids=expected["ids"], use_cache=False).logits
    worst = float((logits - expected["logits"]).abs().max())
    assert torch.equal(logits, expected["logits"]), f"other logits, by up to {worst:.3g}"


def reason() -> str:
    """The error under way, in a line."""
    kind, error, trace = sys.exc_info()
    place = traceback.extract_tb(trace)[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"{kind.__name__}: {lines[0]} ({Path(place.filename).name}:{place.lineno})"


def answer(path: str, head: str, expected: str) -> dict[str, str]:
    """Loads, computes, saves, loads what was saved and computes again."""
    found = dict.fromkeys(("fresh", "again"), "was not tried")
    try:
        wanted = load_file(expected)
        model = load(path, head)
        check(model, wanted)
        found["fresh"] = "works"
        again = f"{path}-again"
        model.save_pretrained(again)
        del model
        check(load(again, head), wanted)
        found["again"] = "works"
    except Exception:
        step = next(step for step, said in found.items() if said != "works")
        found[step] = reason()
    return found


if __name__ == "__main__":
    serve(answer)
