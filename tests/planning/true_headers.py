"""Model directories with the true headers of published models, and no weights.

The weight files are sparse: as long as the real ones, and almost nothing on disk. Configurations,
tensor names, shapes and dtypes are the published ones.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

REMOTE = Path(__file__).parents[1] / "remote" / "deepseek_moe_like"
SHARD = 5_000_000_000  # bytes that a shard holds at most, as the hub's are
Shapes = Iterator[tuple[str, tuple[int, ...]]]

MIXTRAL = {  # mistralai/Mixtral-8x7B-v0.1
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

DEEPSEEK_V2_LITE = {  # deepseek-ai/DeepSeek-V2-Lite
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}

QWEN3_30B_A3B = {  # Qwen/Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


PHI35_MOE = {  # microsoft/Phi-3.5-MoE-instruct
    "architectures": ["PhiMoEForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phimoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 6400,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "model_type": "phimoe",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {  # the factors are 64 numbers each; no tensor depends on them
        "long_factor": [1.0] * 64,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64,
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32064,
}

QWEN2_57B_A14B = {  # Qwen/Qwen2-57B-A14B
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 2560,
    "norm_topk_prob": False,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 20480,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

DEEPSEEK_MOE_16B = {  # deepseek-ai/deepseek-moe-16b-base; its code is that of the look-alike
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}


def write_model(path: Path, config: dict) -> Path:
    """Writes config.json, the index and sparse shards with the model's true headers."""
    tensors = {
        "mixtral": _mixtral,
        "deepseek_v2": _deepseek,
        "qwen3_moe": _qwen3,
        "phimoe": _phimoe,
        "qwen2_moe": _qwen2,
        "deepseek": _deepseek_moe,
    }
    path.mkdir(parents=True, exist_ok=True)
    if config["model_type"] == "deepseek":
        for file in REMOTE.glob("*.py"):
            shutil.copy(file, path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors[config["model_type"]](config):
        nbytes = 2 * _numel(shape)
        if held + nbytes > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_sparse(path / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(2 * _numel(shape) for shard in shards for shape in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * _numel(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def _outer(c: dict) -> Shapes:
    yield "model.embed_tokens.weight", (c["vocab_size"], c["hidden_size"])
    yield "model.norm.weight", (c["hidden_size"],)
    yield "lm_head.weight", (c["vocab_size"], c["hidden_size"])


def _norms(prefix: str, hidden: int) -> Shapes:
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


def _grouped_attention(prefix: str, c: dict, head: int) -> Shapes:
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    yield f"{prefix}.q_proj.weight", (heads * head, hidden)
    yield f"{prefix}.k_proj.weight", (kv * head, hidden)
    yield f"{prefix}.v_proj.weight", (kv * head, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, heads * head)


def _mixtral(c: dict) -> Shapes:
    hidden, intermediate = c["hidden_size"], c["intermediate_size"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        head = hidden // c["num_attention_heads"]
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        yield f"{prefix}.block_sparse_moe.gate.weight", (c["num_local_experts"], hidden)
        for expert in range(c["num_local_experts"]):
            own = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield f"{own}.w1.weight", (intermediate, hidden)
            yield f"{own}.w2.weight", (hidden, intermediate)
            yield f"{own}.w3.weight", (intermediate, hidden)
        yield from _norms(prefix, hidden)
    yield from _outer(c)


def _deepseek(c: dict) -> Shapes:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        yield f"{attention}.q_proj.weight", (heads * (nope + rope), hidden)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
        yield f"{attention}.kv_a_layernorm.weight", (rank,)
        yield f"{attention}.kv_b_proj.weight", (heads * (nope + value), rank)
        yield f"{attention}.o_proj.weight", (hidden, heads * value)
        if layer < c["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
        else:
            width = c["moe_intermediate_size"]
            yield f"{prefix}.mlp.gate.weight", (c["n_routed_experts"], hidden)
            for expert in range(c["n_routed_experts"]):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, width)
            shared = width * c["n_shared_experts"]
            yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, shared)
        yield from _norms(prefix, hidden)
    yield from _outer(c)


def _qwen3(c: dict) -> Shapes:
    hidden, head = c["hidden_size"], c["head_dim"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.gate.weight", (c["num_experts"], hidden)
        for expert in range(c["num_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, c["moe_intermediate_size"])
        yield from _norms(prefix, hidden)
    yield from _outer(c)


def _phimoe(c: dict) -> Shapes:
    hidden, intermediate = c["hidden_size"], c["intermediate_size"]
    narrow = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.block_sparse_moe.gate.weight", (c["num_local_experts"], hidden)
        for expert in range(c["num_local_experts"]):
            own = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield f"{own}.w1.weight", (intermediate, hidden)
            yield f"{own}.w2.weight", (hidden, intermediate)
            yield f"{own}.w3.weight", (intermediate, hidden)
        yield from _norms(prefix, hidden)
        yield f"{prefix}.input_layernorm.bias", (hidden,)
        yield f"{prefix}.post_attention_layernorm.bias", (hidden,)
    yield from _outer(c)
    yield "model.norm.bias", (hidden,)
    yield "lm_head.bias", (c["vocab_size"],)


def _qwen2(c: dict) -> Shapes:
    hidden, width = c["hidden_size"], c["moe_intermediate_size"]
    head = hidden // c["num_attention_heads"]
    narrow = head * c["num_key_value_heads"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.mlp.gate.weight", (c["num_experts"], hidden)
        for expert in range(c["num_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, width)
        shared = c["shared_expert_intermediate_size"]
        yield from _mlp(f"{prefix}.mlp.shared_expert", hidden, shared)
        yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
        yield from _norms(prefix, hidden)
    yield from _outer(c)


def _deepseek_moe(c: dict) -> Shapes:
    hidden, width = c["hidden_size"], c["moe_intermediate_size"]
    head = hidden // c["num_attention_heads"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        if layer < c["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
        else:
            yield f"{prefix}.mlp.gate.weight", (c["n_routed_experts"], hidden)
            for expert in range(c["n_routed_experts"]):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, width)
            yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, width * c["n_shared_experts"])
        yield from _norms(prefix, hidden)
    yield from _outer(c)
