"""A look-alike of DeepSeek-MoE-16B: code of its own, experts in an `nn.ModuleList`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from .common import VOCABULARY

REMOTE = Path(__file__).parent.parent / "remote" / "deepseek_moe_like"
_REMOTE_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "model_type": "deepseek",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "use_cache": True,
}


def save_remote(path: Path, seed: int = 0, **changes: object) -> Path:
    """Writes a tiny look-alike of DeepSeek-MoE-16B with the code that it takes; no tokenizer.

    The files are named as on the hub: every expert's three matrices by themselves.
    """
    config = {**_REMOTE_CONFIG, **changes}
    path.mkdir(parents=True, exist_ok=True)
    for file in REMOTE.glob("*.py"):
        shutil.copy(file, path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, str(config["torch_dtype"]))
    tensors = {
        name: (
            0.2 * torch.randn(shape, generator=generator)
            if len(shape) > 1
            else 1 + 0.1 * torch.randn(shape, generator=generator)
        ).to(dtype)
        for name, shape in _remote_shapes(config)
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _remote_shapes(c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = c["hidden_size"]
    narrow = hidden // c["num_attention_heads"] * c["num_key_value_heads"]

    def mlp(prefix: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (size, hidden)
        yield f"{prefix}.up_proj.weight", (size, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, size)

    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        if layer < c["first_k_dense_replace"]:
            yield from mlp(f"{prefix}.mlp", c["intermediate_size"])
        else:
            size = c["moe_intermediate_size"]
            yield f"{prefix}.mlp.gate.weight", (c["n_routed_experts"], hidden)
            for expert in range(c["n_routed_experts"]):
                yield from mlp(f"{prefix}.mlp.experts.{expert}", size)
            yield from mlp(f"{prefix}.mlp.shared_experts", size * c["n_shared_experts"])
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)
