"""Peak memory does not grow with the number of layers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.tiny_run import DEMO, TEXT

PEAK = Path(__file__).parent / "peak_memory.py"
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 12288,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
STEPS = {
    "svd_llm": {
        "budget": {"remove": 0.4, "of": "experts"},
        "steps": [{"decompose": "svd_llm"}],
    },
    "svd": {"steps": [{"decompose": "svd", "size": {"rank": 32}}]},
    "d2moe": {
        "budget": {"remove": 0.4, "of": "experts"},
        "steps": [{"merge": "fisher"}, {"decompose": "delta_svd"}, {"prune": "semi_dynamic"}],
    },
}


def write_mixtral(path: Path, layers: int) -> Path:
    """Writes a random Mixtral, one layer in memory at a time: 151 MB each."""
    path.mkdir()
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5).bfloat16()

    weight_map = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    norm = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        own = f"model.layers.{layer}"
        experts = f"{own}.block_sparse_moe.experts"
        tensors = {f"{own}.self_attn.{x}_proj.weight": weight(hidden, hidden) for x in "qkvo"}
        tensors[f"{own}.block_sparse_moe.gate.weight"] = weight(8, hidden)
        for expert in range(8):
            tensors[f"{experts}.{expert}.w1.weight"] = weight(intermediate, hidden)
            tensors[f"{experts}.{expert}.w3.weight"] = weight(intermediate, hidden)
            tensors[f"{experts}.{expert}.w2.weight"] = weight(hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{own}.{name}.weight"] = norm.clone()
        save(layer + 2, tensors)
    save(1, {"model.embed_tokens.weight": weight(4096, hidden), "model.norm.weight": norm})
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, path)
    return path


def grown(path: Path, model: Path, steps: dict) -> int:
    """Bytes by which a run's peak exceeds what its imports take."""
    path.mkdir()
    recipe = {
        "model": str(model),
        "output": str(path / "out"),
        "calibration": {
            "text": str(TEXT / "calibration" / "*.jsonl"),
            "sequences": 4,
            "length": 64,
        },
        **steps,
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, str(PEAK), str(path / "recipe.yaml"), str(path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(path)
    return found["peak"] - found["imported"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_layers(tmp_path):
    grew: dict[str, list[int]] = {name: [] for name in STEPS}
    for layers in (4, 12):
        model = write_mixtral(tmp_path / f"mixtral-{layers}", layers)
        for name, steps in STEPS.items():
            grew[name].append(grown(tmp_path / f"{name}-{layers}", model, steps))
        shutil.rmtree(model)
    for name, (few, many) in grew.items():
        print(f"{name}: {few / 1e6:.0f} MB for 4 layers, {many / 1e6:.0f} MB for 12")
    for name, (few, many) in grew.items():
        assert many < 1.15 * few, f"{name}: {few} bytes for 4 layers, {many} for 12"
