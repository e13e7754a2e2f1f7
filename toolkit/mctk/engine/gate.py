"""The gate: what was written is what was computed, or the run fails.

A streamed forward over the written files must give, bit for bit, the logits that the passes' own
terms gave while the layers were in memory; where the model fits, so must `from_pretrained` in a
fresh process. Of native output the process first computes without mctk: transformers adds up
experts in another order, so its logits must agree up to rounding; once mctk runs the experts they
are the same bits. Sizes must equal the restated plan, and "0 tensors changed" is an error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from ..checkpoint import Source
from ..models import auto_class_name
from ..sweep import StreamedModel, stream_logits

# Relative squared error of logits that rounding may leave; a router's row in a wrong place is far
# beyond it.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-2}

PROBE = """
import sys, torch
path, dtype, device, folder, threads, remote, native, auto, part = sys.argv[1:10]
if native == "0":
    import mctk
import transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(threads))
model, info = getattr(transformers, auto).from_pretrained(
    path, dtype=getattr(torch, dtype), device_map={"": device}, trust_remote_code=remote == "1",
    output_loading_info=True,
)
model.eval()
speaks = model.get_submodule(part)
ids = load_file(folder + "/probe_ids.safetensors")["ids"].to(device)
found = {}
if native == "1":
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        found["plain"] = speaks(input_ids=ids, use_cache=False).logits.cpu().contiguous()
    assert "mctk" not in sys.modules
    import mctk.runtime
if native == "0" or any(hasattr(module, "_apply_gate") for module in model.modules()):
    model.set_experts_implementation("mctk")
for name in ("mapped", "aligned"):
    with torch.no_grad():
        logits = speaks(input_ids=ids, use_cache=False).logits
    found[name] = logits.cpu().contiguous()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
save_file(found, folder + "/probe_logits.safetensors")
"""


class GateError(RuntimeError):
    """The written checkpoint is not what was computed: a bug, never a user's mistake."""


def check_streamed(
    output: Path, model: StreamedModel, ids: torch.Tensor, expected: torch.Tensor
) -> dict[str, Any]:
    """Streams the first sequence over the written files and compares the logits' bits.

    Args:
        output: The written checkpoint.
        model: The original's streamed model (for device, dtype and remote code).
        ids: Token ids [1, T].
        expected: Logits [1, T, V] of the terms as the passes left them.
    """
    remote = model.model.config.__class__.__module__.startswith("transformers_modules")
    written = StreamedModel(Source(output), str(model.device), _name(model.dtype), remote)
    logits = next(iter(stream_logits(written, ids))).cpu()
    if not torch.equal(logits, expected):
        worst = float((logits.float() - expected.float()).abs().max())
        raise GateError(f"{output}: the written files give other logits (by up to {worst:.3g})")
    return {"streamed_equal": True, "max_abs_logit": float(logits.float().abs().max())}


def check_fresh_process(
    output: Path,
    state: Path,
    model: StreamedModel,
    ids: torch.Tensor,
    expected: torch.Tensor,
    native: bool = False,
) -> dict[str, Any]:
    """Loads the checkpoint with `from_pretrained` in a fresh process and compares the bits.

    A tensor that does not start at a multiple of the processor's vectors, which copied tensors of
    odd sizes can bring about in a memory-mapped file, is multiplied with other last bits. So the
    bits may be met by the tensors as they are mapped, or once they are copied to aligned memory.

    Args:
        output: The written checkpoint.
        state: A directory for what the two processes tell each other.
        model: The original's streamed model (for device, dtype and remote code).
        ids: Token ids [1, T].
        expected: Logits [1, T, V] of the terms as the passes left them.
        native: Whether the checkpoint must load without mctk. (Remote code that only loads with
            mctk's help does so as the original does.)

    Returns:
        "fresh_process_equal": True; or None where the model does not fit into memory and this was
        left out. Of native output also "plain_error": the relative squared error of the logits that
        transformers gives without mctk.
    """
    need = sum(info.numel for info in Source(output).tensors.values()) * model.dtype.itemsize
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        if model.device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if 1.3 * need > free:
        return {"fresh_process_equal": None}
    save_file({"ids": ids.cpu()}, str(state / "probe_ids.safetensors"))
    remote = model.model.config.__class__.__module__.startswith("transformers_modules")
    command = [
        sys.executable, "-c", PROBE, str(output), _name(model.dtype), str(model.device),
        str(state), str(torch.get_num_threads()), "1" if remote else "0",
        "1" if native and not remote else "0", auto_class_name(model.config), model.language_path,
    ]  # fmt: skip
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise GateError(f"{output}: does not load in a fresh process:\n{done.stderr[-2000:]}")
    found = load_file(str(state / "probe_logits.safetensors"))
    for name in ("probe_ids.safetensors", "probe_logits.safetensors"):
        (state / name).unlink()
    plain = found.pop("plain", None)
    if not any(torch.equal(logits, expected) for logits in found.values()):
        worst = float((found["aligned"].float() - expected.float()).abs().max())
        raise GateError(
            f"{output}: from_pretrained in a fresh process gives other logits (by {worst:.3g})"
        )
    if plain is None:
        return {"fresh_process_equal": True}
    exact = expected.double()
    error = float((plain.double() - exact).square().sum() / exact.square().sum())
    if not error <= ROUNDING.get(model.dtype, 1e-2):
        raise GateError(
            f"{output}: without mctk, from_pretrained gives other logits (relative squared error "
            f"{error:.3g})"
        )
    return {"fresh_process_equal": True, "plain_error": error}


def check_sizes(planned: Any, parameters: int, nbytes: int) -> None:
    """The restated plan must equal the written files."""
    if planned is not None and (planned.parameters, planned.bytes) != (parameters, nbytes):
        raise GateError(
            f"the plan says {planned.parameters} parameters in {planned.bytes} bytes, the files "
            f"hold {parameters} in {nbytes}: {json.dumps(planned.as_dict())}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
