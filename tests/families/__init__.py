"""Tiny random models of every Mixture-of-Experts family of the installed transformers.

`text`, `text_more` and `multimodal` hold the configurations, `models` makes models of them,
`remote` writes a model with code of its own, and `check` takes a family through the toolkit.
"""

from .common import VOCABULARY
from .models import CONFIGS, tiny, tiny_config, token_ids
from .remote import save_remote

FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "phimoe",
    "granitemoe",
    "gpt_oss",
    "glm4_moe",
]
"""Ten families that between them have most of what occurs; every test run covers these."""

EVERY_FAMILY = sorted(CONFIGS)
"""All that are causal language models, or have one."""

__all__ = [
    "CONFIGS",
    "EVERY_FAMILY",
    "FAMILIES",
    "VOCABULARY",
    "save_remote",
    "tiny",
    "tiny_config",
    "token_ids",
]
