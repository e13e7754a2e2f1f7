"""Tiny random models of every family that we promise to support.

All have H = 32, I = 24 and 4 experts of which 2 are used (deepseek_v3: 8 experts in 2 groups): no
two of H, I, E are equal, so that a layout taken for another cannot go unnoticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 96

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_CONFIGS: dict[str, dict] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
        "num_experts": 4,
    },
    "qwen3_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "deepseek_v2": {
        **_LATENT_ATTENTION,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        **_LATENT_ATTENTION,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 4},
    "phimoe": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "granitemoe": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "tie_word_embeddings": True,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 1.5,
        "logits_scaling": 2.0,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "head_dim": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "use_qk_norm": True,
    },
    # A dense model: its linear layers can be compressed too, and it has no experts to check for.
    "llama": {"intermediate_size": 24},
}

FAMILIES = [name for name in _CONFIGS if name != "llama"]
"""The Mixture-of-Experts families (`llama` is the one dense model)."""


def tiny_config(name: str, **changes: object) -> PretrainedConfig:
    """Returns the configuration of `tiny(name)`; keyword arguments replace single entries."""
    return AutoConfig.for_model(name, **{**_COMMON, **_CONFIGS[name], **changes})


def tiny(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Returns a float32 model of the family with random weights in evaluation mode.

    Matrices are drawn with a standard deviation that keeps the size of activations; vectors
    (biases, norms, sinks, correction biases) are non-trivial too, so that a forgotten one shows.
    """
    config = tiny_config(name, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(0.2 * noise)
            elif key.endswith("norm.weight") or "norm" in key.rsplit(".", 2)[-2]:
                tensor.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                tensor.copy_(0.2 * noise)
    return model


def token_ids(rows: int = 2, length: int = 17, seed: int = 1) -> torch.Tensor:
    """Returns random token ids, [rows, length], without the special tokens 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


REMOTE = Path(__file__).parent / "remote" / "deepseek_moe_like"
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
