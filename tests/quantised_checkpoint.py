"""Turns ordinary checkpoints into quantised ones, as DeepSeek-V3 and gpt-oss are stored.

The quantisation is this file's own, element by element from the formats' definitions: what tests
expect of a dequantised tensor is what it gives back beside the stored ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FILE = "model.safetensors"
FOUR_BITS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_fp8(
    weight: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises a matrix in blocks, the last ones cut.

    Args:
        weight: Of any floating dtype [out, in].
        block: Rows and columns that share a scale.

    Returns:
        Numbers in float8 [out, in], scales in float32, and in float32 what the two stand for.
    """
    rows, columns = weight.shape
    numbers = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    meant = torch.zeros(rows, columns)
    factors = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            place = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            part = weight[place].float()
            factors[i, j] = factor = part.abs().max() / 448
            numbers[place] = (part / factor).to(torch.float8_e4m3fn)
            meant[place] = numbers[place].float() * factor
    return numbers, factors, meant


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantises stacked matrices in blocks of 32 along their inputs.

    Args:
        weight: As gpt-oss holds it [E, in, out].

    Returns:
        Blocks [E, out, in / 32, 16], exponents [E, out, in / 32], and in float32 [E, in, out] what
        the two stand for.
    """
    experts, inputs, out = weight.shape
    groups = weight.float().transpose(1, 2).reshape(experts, out, inputs // 32, 32)
    exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 6)).clamp(-127, 127)
    scaled = groups / 2.0 ** exponents[..., None]
    nearest = (scaled.abs()[..., None] - FOUR_BITS).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    signed = torch.cat([FOUR_BITS, -FOUR_BITS])[codes.long()]
    meant = (signed * 2.0 ** exponents[..., None]).reshape(experts, out, inputs).transpose(1, 2)
    blocks = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return blocks, (exponents + 127).to(torch.uint8), meant.contiguous()


def change_config(path: Path, **changes: object) -> Path:
    """Changes keys of a directory's config.json; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def store_fp8(path: Path, block: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    """Stores a directory's matrices in FP8, as DeepSeek-V3's: all but embeddings, head, routers.

    Returns:
        In float32 what the quantised tensors stand for.
    """
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / FILE).items():
        if "proj" in name and tensor.dim() == 2:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = to_fp8(tensor, block)
        else:
            stored[name] = tensor
    save_file(stored, path / FILE, {"format": "pt"})
    settings = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": list(block),
    }
    change_config(path, quantization_config=settings)
    return meant


def store_mxfp4(path: Path) -> dict[str, torch.Tensor]:
    """Stores a gpt-oss directory's experts in MXFP4; returns in float32 what they stand for."""
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / FILE).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, meant[name] = to_mxfp4(tensor)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            stored[name] = tensor
    save_file(stored, path / FILE, {"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    change_config(path, quantization_config=settings)
    return meant


def store_plain(path: Path, meant: dict[str, torch.Tensor], like: Path) -> Path:
    """Writes the ordinary checkpoint, in bfloat16, that a quantised one stands for.

    Args:
        path: Where to.
        meant: What the quantised tensors stand for.
        like: The quantised directory.
    """
    path.mkdir()
    replaced = ("_scale_inv", "_blocks", "_scales")
    tensors = {
        name: tensor
        for name, tensor in load_file(like / FILE).items()
        if not name.endswith(replaced)
    }
    tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in meant.items()}
    save_file(tensors, path / FILE, {"format": "pt"})
    (path / "config.json").write_text((like / "config.json").read_text())
    return change_config(path, quantization_config=None)


def add_predictor(path: Path, layers: int, routed: bool = True) -> list[str]:
    """Adds a layer for multi-token prediction, as DeepSeek-V3's, made of the last decoder layer's.

    Args:
        path: A directory in one file; its config.json says 1 afterwards.
        layers: How many decoder layers it has; the new one's number.
        routed: Whether it has experts; else a dense MLP, which is the first expert.

    Returns:
        The names of the new tensors.
    """
    tensors = load_file(path / FILE)
    old, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    added = {
        new + name.removeprefix(old): tensor + 0.125
        for name, tensor in tensors.items()
        if name.startswith(old)
    }
    hidden = tensors["model.norm.weight"].shape[0]
    if not routed:
        for name in [name for name in added if ".mlp." in name]:
            tensor = added.pop(name)
            if ".experts.0." in name:
                added[name.replace(".experts.0.", ".")] = tensor
    dtype = tensors["model.norm.weight"].dtype
    added[f"{new}eh_proj.weight"] = torch.ones(hidden, 2 * hidden, dtype=dtype)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{new}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
    save_file(tensors | added, path / FILE, {"format": "pt"})
    change_config(path, num_nextn_predict_layers=1)
    return sorted(added)
