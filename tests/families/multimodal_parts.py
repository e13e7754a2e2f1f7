"""What the tiny configurations of several multi-modal families have in common."""

from __future__ import annotations

DENSE_FIRST = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
ONE_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# Towers of the Qwen-VL line and of those that took them over.
DEPTH_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
QWEN_TOWER = {**DEPTH_TOWER, "num_position_embeddings": 16}
DEEPSTACK_TOWER = {**QWEN_TOWER, "deepstack_visual_indexes": [0]}
SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "downsample_channels": [8, 16],
}


def rope(*sections: int, **more: object) -> dict:
    """Rotary embeddings whose frequencies are shared out between time, height and width."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            **more,
        }
    }


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
INKLING = {
    "head_dim": 16,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
}
INKLING2 = {
    **INKLING,
    "unpadded_vocab_size": 96,
    "log_scaling_n_floor": 8,
    "n_layers_per_attn_res_block": 2,
}
INKLING2_TOWER = {
    **TOWER,
    "model_type": "inkling2_vision",
    "patch_size": 4,
    "posemb_grid_size": 4,
    "projection_hidden_dim": 24,
    "text_hidden_size": 32,
}
