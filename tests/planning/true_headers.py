"""Model directories with the true headers of published models, and no weights.

The weight files are sparse: as long as the real ones, and almost nothing on disk. Configurations,
tensor names, shapes and dtypes are the published ones.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

REMOTE = Path(__file__).parents[1] / "remote" / "deepseek_moe_like"
SHARD = 5_000_000_000  # bytes that a shard holds at most, as the hub's are
Shapes = Iterator[tuple[str, tuple[int, ...]]]
WIDTHS = {"BF16": 2, "U8": 1}  # bytes


def write_model(path: Path, config: dict) -> Path:
    """Writes config.json, the index and sparse shards with the model's true headers."""
    tensors = {
        "mixtral": _mixtral,
        "deepseek_v2": _deepseek,
        "qwen3_moe": _qwen3,
        "phimoe": _phimoe,
        "qwen2_moe": _qwen2,
        "deepseek": _deepseek_moe,
        "olmoe": _olmoe,
        "gpt_oss": _gpt_oss,
    }
    path.mkdir(parents=True, exist_ok=True)
    if config["model_type"] == "deepseek":
        for file in REMOTE.glob("*.py"):
            shutil.copy(file, path)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in tensors[config["model_type"]](config):
        nbytes = _nbytes(name, shape)
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
    total = sum(_nbytes(*item) for shard in shards for item in shard.items())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _dtype(name: str) -> str:
    """MXFP4's numbers and exponents are bytes, all else is bfloat16."""
    return "U8" if name.endswith(("_blocks", "_scales")) else "BF16"


def _nbytes(name: str, shape: tuple[int, ...]) -> int:
    return WIDTHS[_dtype(name)] * math.prod(shape)


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _nbytes(name, shape)
        header[name] = {"dtype": _dtype(name), "shape": list(shape), "data_offsets": [start, end]}
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
    head = c["head_dim"]
    yield from _normed_heads(c, head, head, c["moe_intermediate_size"])


def _olmoe(c: dict) -> Shapes:
    hidden = c["hidden_size"]
    head = hidden // c["num_attention_heads"]
    yield from _normed_heads(c, head, hidden, c["intermediate_size"])


def _normed_heads(c: dict, head: int, norm: int, width: int) -> Shapes:
    """Attention whose queries and keys are normalised, and experts of a width in every layer."""
    hidden = c["hidden_size"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        yield f"{prefix}.self_attn.q_norm.weight", (norm,)
        yield f"{prefix}.self_attn.k_norm.weight", (norm,)
        yield f"{prefix}.mlp.gate.weight", (c["num_experts"], hidden)
        for expert in range(c["num_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, width)
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


def _gpt_oss(c: dict) -> Shapes:
    hidden, width, experts = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    head, heads = c["head_dim"], c["num_attention_heads"]
    narrow = head * c["num_key_value_heads"]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_attention(f"{prefix}.self_attn", c, head)
        for name, rows in (("q", heads * head), ("k", narrow), ("v", narrow), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.sinks", (heads,)
        yield f"{prefix}.mlp.router.weight", (experts, hidden)
        yield f"{prefix}.mlp.router.bias", (experts,)
        for name, rows, inputs in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
            own = f"{prefix}.mlp.experts.{name}_proj"
            yield f"{own}_bias", (experts, rows)
            yield f"{own}_blocks", (experts, rows, inputs // 32, 16)
            yield f"{own}_scales", (experts, rows, inputs // 32)
        yield from _norms(prefix, hidden)
    yield from _outer(c)
