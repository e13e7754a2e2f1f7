"""The gate: what was written is what was computed, or the run fails.

A streamed forward over the written files must give, bit for bit, the logits that the passes' own
terms gave while the layers were in memory; where the model fits, so must `from_pretrained` in a
fresh process. Sizes must equal the restated plan, and "0 tensors changed" is an error.
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
from ..sweep import StreamedModel, stream_logits

PROBE = """
import sys, torch, mctk
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
path, dtype, device, folder, threads, remote = sys.argv[1:7]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(
    path, dtype=getattr(torch, dtype), device_map={"": device}, trust_remote_code=remote == "1"
).eval()
model.set_experts_implementation("mctk")
ids = load_file(folder + "/probe_ids.safetensors")["ids"].to(device)
found = {}
for name in ("mapped", "aligned"):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
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
    output: Path, state: Path, model: StreamedModel, ids: torch.Tensor, expected: torch.Tensor
) -> bool | None:
    """Loads the checkpoint with `from_pretrained` in a fresh process and compares the bits.

    A tensor that does not start at a multiple of the processor's vectors, which copied tensors of
    odd sizes can bring about in a memory-mapped file, is multiplied with other last bits. So the
    bits may be met by the tensors as they are mapped, or once they are copied to aligned memory.

    Returns:
        True; or None where the model does not fit into memory and this was left out.
    """
    need = sum(info.numel for info in Source(output).tensors.values()) * model.dtype.itemsize
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        if model.device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if 1.3 * need > free:
        return None
    save_file({"ids": ids.cpu()}, str(state / "probe_ids.safetensors"))
    remote = model.model.config.__class__.__module__.startswith("transformers_modules")
    command = [
        sys.executable, "-c", PROBE, str(output), _name(model.dtype), str(model.device),
        str(state), str(torch.get_num_threads()), "1" if remote else "0",
    ]  # fmt: skip
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise GateError(f"{output}: does not load in a fresh process:\n{done.stderr[-2000:]}")
    found = load_file(str(state / "probe_logits.safetensors"))
    for name in ("probe_ids.safetensors", "probe_logits.safetensors"):
        (state / name).unlink()
    if not any(torch.equal(logits, expected) for logits in found.values()):
        worst = float((found["aligned"].float() - expected.float()).abs().max())
        raise GateError(
            f"{output}: from_pretrained in a fresh process gives other logits (by {worst:.3g})"
        )
    return True


def check_sizes(planned: Any, parameters: int, nbytes: int) -> None:
    """The restated plan must equal the written files."""
    if planned is not None and (planned.parameters, planned.bytes) != (parameters, nbytes):
        raise GateError(
            f"the plan says {planned.parameters} parameters in {planned.bytes} bytes, the files "
            f"hold {parameters} in {nbytes}: {json.dumps(planned.as_dict())}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
