"""A tiny random Mixtral on disk, text for it, and recipes over both: what whole runs are tested on.

A directory's conftest imports the fixtures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

DEMO = Path(__file__).parents[1] / "recipes" / "demo"
TEXT = DEMO / "text"


def save_mixtral(path: Path, seed: int = 0, shard: str = "200kB", **config: object) -> Path:
    """Writes a random Mixtral with the demo's tokenizer, bfloat16, in several shards."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": 4096,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **config,
    }
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    return path


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def write_recipe(mixtral: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe with these keys over the defaults; None leaves a key out."""

    def write(name: str = "recipe", **changes: object) -> Path:
        recipe: dict = {
            "model": str(mixtral),
            "output": str(tmp_path / "out"),
            "calibration": {
                "text": str(TEXT / "calibration" / "*.jsonl"),
                "sequences": 12,
                "length": 64,
                "batch": 4,
            },
            "budget": {"remove": 0.4, "of": "experts"},
            "steps": [{"decompose": "svd_llm", "options": {"rank_multiple": 1}}],
            "gate": False,  # it starts a process; tests that look at it ask for it
        }
        recipe |= changes
        recipe = {key: value for key, value in recipe.items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return write


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
