"""Tiny configurations of the families that come as `...ForConditionalGeneration`.

The language model's entries are in `text_config`, on top of `COMMON`; what sees and hears is as
small as its class allows. Ids of image and audio tokens are such as no tiny vocabulary holds.
"""

from __future__ import annotations

from .common import INDEXER, LATENT_ATTENTION

_DENSE_FIRST = {
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
_ONE_SHARED = {"n_routed_experts": 4, "n_shared_experts": 1}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
# Towers of the Qwen-VL line and of those that took them over.
_DEPTH_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_QWEN_TOWER = {**_DEPTH_TOWER, "num_position_embeddings": 16}
_DEEPSTACK_TOWER = {**_QWEN_TOWER, "deepstack_visual_indexes": [0]}
_SAM = {
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


def _rope(*sections: int, **more: object) -> dict:
    """Rotary embeddings whose frequencies are shared out between time, height and width."""
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
            **more,
        }
    }


_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_INKLING = {
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
_INKLING2 = {
    **_INKLING,
    "unpadded_vocab_size": 96,
    "log_scaling_n_floor": 8,
    "n_layers_per_attn_res_block": 2,
}
_INKLING2_TOWER = {
    **_TOWER,
    "model_type": "inkling2_vision",
    "patch_size": 4,
    "posemb_grid_size": 4,
    "projection_hidden_dim": 24,
    "text_hidden_size": 32,
}

MULTIMODAL: dict[str, dict] = {
    "aria": {
        "text_config": {
            "intermediate_size": 24,
            "num_experts_per_tok": None,
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        "vision_config": {
            **_TOWER,
            "model_type": "idefics3_vision",
            "image_size": 28,
            "patch_size": 14,
        },
        "projector_patch_to_query_dict": {4: 2},
        "image_token_index": 200,
    },
    "deepseek_ocr2": {
        "text_config": {**_DENSE_FIRST, **_ONE_SHARED},
        "vision_config": {
            "sam_config": _SAM,
            "encoder_config": {**_TOWER, "num_key_value_heads": 2},
        },
    },
    "dots3_note": {
        "text_config": {
            **LATENT_ATTENTION,
            **INDEXER,
            **_DENSE_FIRST,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "shared_experts_intermediate_size": 20,
            "head_dim": 16,
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
            "sliding_window": 8,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 12,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 10,
        },
        # Its tower has experts of its own.
        "vision_config": {
            **_TOWER,
            "num_hidden_layers": 2,
            "patch_size": 4,
            "moe_intermediate_size": 12,
            "mlp_layer_types": ["dense", "sparse"],
            "num_local_experts": 4,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        "audio_config": {
            **_TOWER,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
    },
    # Text and images have experts of their own in each layer; those of text are compressed.
    "ernie4_5_vl_moe": {
        "text_config": {
            "intermediate_size": 40,
            "moe_intermediate_size": [24, 12],
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "num_hidden_layers": 3,
            **_rope(3, 3, 2),
        },
        "vision_config": {k: v for k, v in _DEPTH_TOWER.items() if k != "out_hidden_size"},
    },
    "gemma4": {
        "text_config": {
            **_SLIDING,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "num_experts_per_tok": None,
            "head_dim": 16,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 96,
            "final_logit_softcapping": 30.0,
        },
        "vision_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 16,
        },
        "audio_config": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [4, 4],
            "output_proj_dims": 16,
        },
    },
    "glm4v_moe": {
        "text_config": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            **_ONE_SHARED,
            **_rope(2, 1, 1, partial_rotary_factor=0.5),
        },
        "vision_config": {**_DEPTH_TOWER, "image_size": 8},
    },
    "glm5_next": {
        "text_config": {
            **LATENT_ATTENTION,
            **_ONE_SHARED,
            "qk_rope_head_dim": 0,
            "index_topk": 6,
            "index_kpool": 2,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "layer_types": [
                "linear_attention",
                "indexed_attention",
                "indexed_attention",
                "linear_attention",
            ],
            "indexer_types": ["full", "full", "shared", "full"],
            "linear_head_dim": 8,
            "linear_num_heads": 2,
            "hc_mult": 2,
            "swiglu_limit": 1.0,
        },
        "vision_config": {**_DEPTH_TOWER, "image_size": 8, "projection_intermediate_size": 24},
    },
    "hy_v4_vl": {
        "text_config": {
            **LATENT_ATTENTION,
            **INDEXER,
            **_DENSE_FIRST,
            **_ONE_SHARED,
            "indexer_types": ["full", "full", "shared"],
            "hc_mult": 2,
            "swiglu_limit": 1.0,
            **_rope(2, 1, 1),
        },
        "vision_config": {
            **_TOWER,
            "out_hidden_size": 32,
            "patch_size": 4,
            "max_image_size": 16,
        },
    },
    "inkling2": {
        "text_config": {
            **_INKLING2,
            "num_hidden_layers": 4,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        },
        "vision_config": _INKLING2_TOWER,
    },
    "inkling2_loop": {
        "text_config": {
            **_INKLING2,
            "num_hidden_layers": 6,
            "layer_types": ["hybrid_sliding", "hybrid"] * 3,
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
            "loop_num_passes": 2,
            "loop_gate_rank": 4,
        },
        "vision_config": _INKLING2_TOWER,
    },
    "inkling_mm_model": {
        "text_config": {
            **_INKLING,
            **_DENSE_FIRST,
            "n_shared_experts": 1,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
            "logits_mup_width_multiplier": 2.0,
        },
        "vision_config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
        },
        "audio_config": {"n_mel_bins": 4, "mel_vocab_size": 8},
    },
    "minimax_m3_vl": {
        "text_config": {
            "intermediate_size": 24,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 20,
            "num_local_experts": 4,
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
            "head_dim": 16,
            "rotary_dim": 8,
            "index_n_heads": 1,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 2,
            "swiglu_limit": 1.0,
        },
        "vision_config": {**_TOWER, "patch_size": 4, "image_size": 8},
        "projector_hidden_size": 24,
    },
    "mistral_large4": {
        "text_config": {
            **LATENT_ATTENTION,
            **INDEXER,
            **_DENSE_FIRST,
            **_ONE_SHARED,
            "indexer_types": ["full", "full", "shared"],
            "kv_source_layers": [0, 1, 1],
        },
        "vision_config": {**_TOWER, "model_type": "pixtral", "patch_size": 4, "image_size": 16},
        "image_token_index": 200,
    },
    "muse_spark": {
        "text_config": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "moe_hidden_size": 16,
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "head_dim": 16,
            "sliding_window": 8,
        },
        "vision_config": {
            **_TOWER,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "max_position_embeddings": 16,
        },
        "audio_config": {
            "patch_sizes": [2],
            "hidden_sizes": [8],
            "depths": [1],
            "num_hidden_layers": 1,
            "out_hidden_size": 32,
        },
        "out_hidden_size": 64,
        "projector_hidden_size": 24,
    },
    "qwen3_5_moe": {
        "text_config": {
            **_LINEAR,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            **_rope(2, 1, 1, partial_rotary_factor=0.5),
        },
        "vision_config": _QWEN_TOWER,
    },
    # A writer (the thinker), whose text model is compressed, and a talker with experts of its own.
    "qwen3_omni_moe": {
        "thinker_config": {
            "text_config": {
                "intermediate_size": 40,
                "moe_intermediate_size": 24,
                "num_experts": 4,
                "mlp_only_layers": [0],
                "num_hidden_layers": 3,
                **_rope(4, 2, 2),
            },
            "vision_config": _DEEPSTACK_TOWER,
            "audio_config": {
                "num_mel_bins": 8,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24,
                "d_model": 16,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
        },
        "talker_config": {
            "text_config": {
                "vocab_size": 40,
                "hidden_size": 16,
                "intermediate_size": 20,
                "moe_intermediate_size": 12,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "shared_expert_intermediate_size": 12,
                **_rope(2, 1, 1),
            },
            "code_predictor_config": {
                **_TOWER,
                "vocab_size": 20,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "num_code_groups": 2,
            },
            "num_code_groups": 2,
            "thinker_hidden_size": 32,
            "spatial_merge_size": 2,
            "accept_hidden_layer": 1,
        },
        "code2wav_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "codebook_size": 8,
            "num_quantizers": 2,
            "upsample_rates": [2],
            "upsampling_ratios": [2],
            "decoder_dim": 16,
        },
    },
    "qwen3_vl_moe": {
        "text_config": {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "mlp_only_layers": [0],
            "num_hidden_layers": 3,
            "head_dim": 16,
            **_rope(4, 2, 2),
        },
        "vision_config": _DEEPSTACK_TOWER,
    },
    "qwen4_exp": {
        "text_config": {
            **_LINEAR,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
            "hc_count": 2,
            "hc_lowrank": 8,
            "ple_layer_ids": [2],
            "ngram_size": 2,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 50,
            "make_ngram_vocab_size_divisible_by": 4,
            "split_ngram_parts": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 6,
            "indexer_compress_ratio": 2,
            **_rope(2, 1, 1, partial_rotary_factor=0.5),
        },
        "vision_config": _QWEN_TOWER,
    },
    "unlimited_ocr": {
        "text_config": {**_DENSE_FIRST, **_ONE_SHARED, "sliding_window": 8},
        "vision_config": {
            "sam_config": {**_SAM, "mlp_dim": 24},
            "encoder_config": {**_TOWER, "image_size": 28, "patch_size": 14},
        },
    },
}
