"""A process that loads native results as a user without mctk does: it never imports mctk.

`python plain.py` answers each line of JSON {"path": directory, "head": name of an Auto class,
"expected": file of "ids" and "logits"} by a line {"fresh": ..., "again": ...}: "works" or why not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from serving import serve

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
ROUNDING = 1e-4
"""transformers sums up experts in an order of its own."""


def load(path: str | Path, head: str):
    """The model by `from_pretrained`; every tensor must have a place, and every place a tensor."""
    model, info = getattr(transformers, head).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    found = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    assert not found, f"from_pretrained reports {found}"
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # where tensors lie in a file moves last bits
    return model.eval()


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V]; of several speakers without a forward of their own, those of the writer."""
    parts = (model, *model.children())
    speaks = next(part for part in parts if type(part).forward is not torch.nn.Module.forward)
    with torch.no_grad():
        return speaks(input_ids=ids, use_cache=False).logits


def answer(path: str, head: str, expected: str) -> dict[str, str]:
    """Loads, computes, saves, loads what was saved and computes again."""
    found = dict.fromkeys(("fresh", "again"), "was not tried")
    try:
        wanted = load_file(expected)
        first = logits(load(path, head), wanted["ids"])
        worst = float((first - wanted["logits"]).abs().max())
        size = float(wanted["logits"].abs().max())
        assert worst <= ROUNDING * max(size, 1.0), (
            f"other logits, by up to {worst:.3g} of {size:.3g}"
        )
        found["fresh"] = "works"
        again = f"{path}-again"
        load(path, head).save_pretrained(again)
        same = torch.equal(logits(load(again, head), wanted["ids"]), first)
        assert same, "other logits once saved again"
        found["again"] = "works"
        assert "mctk" not in sys.modules, "mctk was imported"
    except Exception as error:  # anything may go wrong in somebody's modelling code
        step = next((step for step, said in found.items() if said != "works"), "again")
        lines = str(error).strip().splitlines() or [""]
        found[step] = f"{type(error).__name__}: {lines[0]}"
    return found


if __name__ == "__main__":
    serve(answer)
