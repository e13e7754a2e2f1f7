"""DeepSeek-V3 as it is published, in FP8 and with a prediction layer: counted from headers.

Of its 61 layers five or six are made, three of them dense; what the last adds gives the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from mctk.checkpoint import Source, TensorInfo, find_unread, size_of_tensors
from mctk.planning import count_model
from mctk.sweep import StreamedModel

from tests.planning.true_configs import DEEPSEEK_V3

CONFIG = DEEPSEEK_V3
HIDDEN, HEADS = CONFIG["hidden_size"], CONFIG["num_attention_heads"]


def mlp(prefix: str, width: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    yield f"{prefix}.gate_proj", (width, HIDDEN), True
    yield f"{prefix}.up_proj", (width, HIDDEN), True
    yield f"{prefix}.down_proj", (HIDDEN, width), True


def decoder_layer(number: int, routed: bool) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Names of modules, shapes of their weights, and whether they are in FP8."""
    prefix = f"model.layers.{number}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{norm}", (HIDDEN,), False
    attention = f"{prefix}.self_attn"
    yield f"{attention}.q_a_proj", (1536, HIDDEN), True
    yield f"{attention}.q_a_layernorm", (1536,), False
    yield f"{attention}.q_b_proj", (HEADS * 192, 1536), True
    yield f"{attention}.kv_a_proj_with_mqa", (576, HIDDEN), True
    yield f"{attention}.kv_a_layernorm", (512,), False
    yield f"{attention}.kv_b_proj", (HEADS * 256, 512), True
    yield f"{attention}.o_proj", (HIDDEN, HEADS * 128), True
    if not routed:
        yield from mlp(f"{prefix}.mlp", CONFIG["intermediate_size"])
        return
    yield f"{prefix}.mlp.gate", (256, HIDDEN), False
    for expert in range(256):
        yield from mlp(f"{prefix}.mlp.experts.{expert}", 2048)
    yield from mlp(f"{prefix}.mlp.shared_experts", 2048)


def modules(layers: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    vocabulary = (CONFIG["vocab_size"], HIDDEN)
    yield "model.embed_tokens", vocabulary, False
    yield "model.norm", (HIDDEN,), False
    yield "lm_head", vocabulary, False
    for number in range(layers + 1):
        yield from decoder_layer(number, number >= 3)
    extra = f"model.layers.{layers}"
    yield f"{extra}.embed_tokens", vocabulary, False
    yield f"{extra}.shared_head.head", vocabulary, False
    yield f"{extra}.eh_proj", (HIDDEN, 2 * HIDDEN), False
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{extra}.{norm}", (HIDDEN,), False


def source(path: Path, layers: int) -> Source:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return Source(path, {"model.safetensors": headers(layers)})


def headers(layers: int) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        found[name] = TensorInfo(name, "model.safetensors", dtype, shape)

    for name, shape, quantised in modules(layers):
        add(f"{name}.weight", "F8_E4M3" if quantised else "BF16", shape)
        if quantised:
            blocks = tuple(math.ceil(size / 128) for size in shape)
            add(f"{name}.weight_scale_inv", "F32", blocks)
        if name.endswith("mlp.gate"):
            add(f"{name}.e_score_correction_bias", "F32", (256,))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[StreamedModel]:
    root = tmp_path_factory.mktemp("deepseek_v3")
    return [StreamedModel(source(root / str(layers), layers)) for layers in (5, 6)]


def extended(five: int, six: int) -> int:
    """A size of 61 layers from those of five and of six."""
    return five + 56 * (six - five)


def test_the_model_is_of_the_published_size(models):
    """671 G parameters, 37 G of them active, without the prediction layer."""
    plain = [count_model(model, {}, model.weights.unread) for model in models]
    assert round(extended(*(sizes.parameters for sizes in plain)) / 1e9) == 671
    assert round(extended(*(sizes.active_parameters for sizes in plain)) / 1e9, 1) == 37.6
    assert all(sizes.bytes >= 2 * sizes.parameters for sizes in plain)


def test_the_prediction_layer_is_of_the_published_size(models):
    """11.5 G parameters of its own; its projection, the embeddings and the head come on top."""
    for model in models:
        unread = find_unread(model.weights.unread, len(model.layers))
        assert unread.routed and not unread.others
        found = size_of_tensors(model.source, unread.predictors)
        beside = 2 * CONFIG["vocab_size"] * HIDDEN + 2 * HIDDEN**2
        assert round((found["parameters"] - beside) / 1e9, 1) == 11.5


def test_bytes_are_those_of_the_files(models):
    for model in models:
        files = sum(info.nbytes for info in model.source.stored.values())
        assert count_model(model, {}, stored=True).bytes == model.source.nbytes == files
    whole = extended(*(count_model(model, {}, stored=True).bytes for model in models))
    assert round(whole / 1e9) == 689  # what the hub shows


def test_blocks_that_128_does_not_divide(models):
    name = "model.layers.4.self_attn.kv_a_proj_with_mqa.weight"
    packed = models[0].source.quantised.packed[name]
    assert packed.block == (128, 128) and packed.info.shape == (576, 7168)
    assert models[0].source.stored[packed.scales].shape == (5, 56)
