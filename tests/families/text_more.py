"""Tiny configurations of the families i to z with a text-only causal language model."""

from __future__ import annotations

from .common import INDEXER, LATENT_ATTENTION

_NARROW = {"intermediate_size": 40, "moe_intermediate_size": 24}
_DENSE_FIRST = {**_NARROW, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _rotary(*layer_types: str, share: float = 0.5) -> dict[str, dict]:
    """Rotary embeddings of a family whose kinds of layers have their own.

    Args:
        layer_types: These kinds.
        share: Of a head's dimensions, how many are rotated.
    """
    default = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    return {"rope_parameters": {kind: default for kind in layer_types}}


TEXT_MORE: dict[str, dict] = {
    # Lightning indexers that some layers share: the later ones are passed what the first chose.
    "hy_v4": {
        **LATENT_ATTENTION,
        **INDEXER,
        **_NARROW,
        "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full", "full", "shared", "shared"],
        "n_routed_experts": 4,
        "hc_mult": 2,
        "routed_scaling_factor": 1.5,
    },
    # Mamba, attention, a dense MLP in every other layer.
    "jamba": {
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 6,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **LATENT_ATTENTION,
        **_DENSE_FIRST,
        "q_lora_rank": None,
        "num_local_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "kolibri1": {
        **_NARROW,
        "num_experts": 4,
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # The layers have different numbers of heads.
    "laguna": {
        **_DENSE_FIRST,
        **_rotary("sliding_attention", "full_attention"),
        "num_experts": 4,
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "sliding_window": 8,
        "num_attention_heads_per_layer": [2, 4, 2],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "moe_routed_scaling_factor": 1.5,
    },
    "lara_mini": {
        **_NARROW,
        **_DELTA_NET,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["linear_attention", "sliding_attention", "full_attention"],
    },
    "lfm2_moe": {
        **_NARROW,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "mellum": {
        **_DENSE_FIRST,
        **_rotary("sliding_attention", "full_attention", share=1.0),
        "num_experts": 4,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "mimo_v2_flash": {
        **_DENSE_FIRST,
        **_rotary("sliding_attention", "full_attention"),
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 16,
        "v_head_dim": 12,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "minimax": {
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_local_experts": 4,
        "head_dim": 16,
        "block_size": 8,
        "linear_attn_alpha_factor": 1.2,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
    },
    "minimax_m2": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 16},
    "mistral4": {
        **LATENT_ATTENTION,
        **_NARROW,
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    # One mixer a layer, experts without a gate, in a space narrower than the hidden states'.
    "nemotron_h": {
        **_NARROW,
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"],
        "head_dim": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "use_mamba_kernels": False,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 20,
        "moe_latent_size": 16,
        "routed_scaling_factor": 1.5,
    },
    "olmoe": {"intermediate_size": 24, "num_experts": 4},
    "phimoe": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "qwen2_moe": {
        **_NARROW,
        "shared_expert_intermediate_size": 20,
        "num_experts": 4,
    },
    "qwen3_moe": {
        **_NARROW,
        "num_experts": 4,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
    },
    "qwen3_next": {
        **_NARROW,
        **_DELTA_NET,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "shared_expert_intermediate_size": 20,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "solar_open": {
        **_NARROW,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 16,
        "routed_scaling_factor": 1.5,
    },
    # Routers are passed what the layer before routed by, and one of their classes is no expert.
    "zaya": {
        **_rotary("hybrid", "hybrid_sliding"),
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "head_dim": 16,
        "router_hidden_size": 12,
        "sliding_window": 8,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
    },
}
