"""Tiny random models on disk with a tokenizer and a text: what a method is tried on.

Four families that differ in what methods trip over: plain experts; shared experts and a dense
layer; a sigmoid router with groups and a correction bias; transposed, interleaved experts with
biases.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest

VOCABULARY = 96
TEXT = "text.jsonl"  # beside the model, the last thing that is written
_WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# H = 64 and I = 48 everywhere: a layout taken for another cannot go unnoticed.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 20,
        "num_experts": 4,
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
    },
    "deepseek_v3": {
        "num_key_value_heads": 2,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "intermediate_size": 40,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    },
    "gpt_oss": {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "head_dim": 32,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def save_tiny(family: str, directory: Path, seed: int = 0) -> Path:
    """Writes a random model of a family, float32, its tokenizer, and `text.jsonl` to calibrate on.

    Matrices keep the size of activations; vectors (biases, norms, corrections) are not trivial
    either, so that one that is forgotten shows.

    Args:
        family: One of `FAMILIES`.
        directory: Where to; made if it is not there.
        seed: Of the weights.

    Returns:
        The directory.

    Raises:
        UserError: There is no such family.
    """
    if family not in FAMILIES:
        raise UserError(f"families: no tiny model of '{family}'{nearest(family, FAMILIES)}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            scale = name.endswith("norm.weight")
            tensor.copy_(0.2 * noise if tensor.ndim > 1 else 0.1 * noise + float(scale))
    with no_progress_bar():
        model.save_pretrained(directory, max_shard_size="200kB")
        _tokenizer().save_pretrained(directory)
    rows = (json.dumps({"text": _text(600, seed)}) for seed in range(3))
    (directory / TEXT).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return directory


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Tiny models are written and read in no time: transformers need not show it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer() -> Any:
    """Splits at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *_WORDS, "<unk>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _text(count: int, seed: int) -> str:
    """So many words, some of them much more frequent than others."""
    source = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(_WORDS))]
    return " ".join(source.choices(_WORDS, weights, k=count))
