"""What the tiny configurations of all families share."""

from __future__ import annotations

VOCABULARY = 96

COMMON = {
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
"""Entries that most configurations know by these names; a family's own come on top."""

LATENT_ATTENTION = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
"""Attention of DeepSeek-V2 and those that took it over."""

INDEXER = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
"""Attention to a few tokens that an indexer picks: fewer than the tests' sequences have."""
