"""FP8 and MXFP4 checkpoints are read as the ordinary ones that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source
from mctk.checkpoint.dequantise import from_blocks, from_mxfp4
from mctk.errors import CheckpointError
from mctk.evaluate.loading import load_model
from mctk.sweep import StreamedModel, stream_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from tests.families import tiny, token_ids
from tests.quantised_checkpoint import (
    FILE,
    change_config,
    store_fp8,
    store_mxfp4,
    store_plain,
    to_fp8,
    to_mxfp4,
)

KV = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 20 rows: cut blocks of 8
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bfloat16") / "deepseek"
    tiny("deepseek_v3").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def fp8(deepseek, tmp_path) -> Path:
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    store_fp8(path)
    return path


@pytest.fixture
def gpt_oss(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path / "mxfp4"
    tiny("gpt_oss", intermediate_size=64).to(torch.bfloat16).save_pretrained(path)
    return path, store_mxfp4(path)


def streamed(path: Path) -> torch.Tensor:
    model = StreamedModel(Source(path))
    assert model.dtype == torch.bfloat16
    return torch.cat(list(stream_logits(model, token_ids())))


def transformers_logits(path: Path, settings: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", quantization_config=settings)
    assert model.dtype == torch.bfloat16
    model.set_experts_implementation("mctk")
    with torch.no_grad():
        return model.eval()(token_ids(), use_cache=False).logits


def read(path: Path) -> dict[str, torch.Tensor]:
    source = Source(path)
    with source.slices(source.tensors) as slices:
        found = {name: slices[name][...] for name in source.tensors}
        for name, info in source.tensors.items():
            assert tuple(slices[name].get_shape()) == info.shape == tuple(found[name].shape)
            assert slices[name].get_dtype() == info.dtype
    return found


def test_fp8_streams_as_transformers_dequantises_it(fp8):
    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(4, 4))
    assert torch.equal(streamed(fp8), transformers_logits(fp8, settings))


def test_mxfp4_streams_as_transformers_dequantises_it(gpt_oss):
    path, _ = gpt_oss
    assert torch.equal(streamed(path), transformers_logits(path, Mxfp4Config(dequantize=True)))


def test_in_memory_the_original_is_what_is_streamed(fp8):
    model = load_model(fp8, "cpu", torch.bfloat16, False)
    with torch.no_grad():
        assert torch.equal(model(token_ids(), use_cache=False).logits, streamed(fp8))


@pytest.mark.parametrize("block", [(4, 4), (8, 8), (16, 8), (128, 128)])
def test_blocks_at_the_edges_are_cut(deepseek, tmp_path, block):
    """As DeepSeek-V3's are; transformers divides matrices into blocks of equal size, or fails."""
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    meant = store_fp8(path, block)
    assert len(meant) > 50
    found = read(path)
    assert all(torch.equal(found[name], meant[name].to(torch.bfloat16)) for name in meant)
    plain = store_plain(tmp_path / "plain", meant, path)
    assert torch.equal(streamed(path), streamed(plain))


def said(path: Path, **changes: object) -> Path:
    """Changes keys of quantization_config; "absent" removes one."""
    settings = json.loads((path / "config.json").read_text())["quantization_config"] | changes
    kept = {key: value for key, value in settings.items() if value != "absent"}
    return change_config(path, quantization_config=kept)


def add_blocks(path: Path, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """Adds a matrix "a.weight" in FP8; returns in bfloat16 what it stands for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # Each row its own size: a row under another block's scale shows.
    numbers, scales, meant = to_fp8(weight * torch.arange(1, shape[0] + 1)[:, None], block)
    added = {"a.weight": numbers, "a.weight_scale_inv": scales}
    save_file(load_file(path / FILE) | added, path / FILE)
    return meant.to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(192, 256), (256, 256), (200, 96)])
def test_blocks_that_are_not_named_are_of_128(deepseek, tmp_path, shape):
    """As for transformers; [192, 256] with [2, 2] scales is no 96 rows a scale."""
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    store_fp8(path, (128, 128))
    meant = add_blocks(path, shape, (128, 128))
    assert torch.equal(read(said(path, weight_block_size="absent"))["a.weight"], meant)


@pytest.mark.parametrize("named", [None, "absent"])
@pytest.mark.parametrize("block", [(1, 32), (64, 64), (1, 96), (192, 1), (192, 96)])
def test_scales_say_the_size_of_other_blocks(deepseek, tmp_path, block, named):
    """One row, one column, all of them, or a power of two of which the last is whole."""
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    store_fp8(path, (128, 128))
    shape = (192, 128) if block == (64, 64) else (192, 96)
    meant = add_blocks(path, shape, block)
    assert torch.equal(read(said(path, weight_block_size=named))["a.weight"], meant)


@pytest.mark.parametrize(
    "shape, block, named",
    [((480, 96), (96, 96), "absent"), ((192, 256), (96, 128), None)],
)
def test_blocks_of_two_sizes_may_be_meant(deepseek, tmp_path, shape, block, named):
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    store_fp8(path, (128, 128))
    add_blocks(path, shape, block)
    said(path, weight_block_size=named)
    refused(path, FILE, "a.weight", f"{block[0]} × {block[1]}, or larger", "weight_block_size")


@pytest.mark.parametrize("block", [(1, 32), (64, 64), (192, 96), (128, 64)])
def test_scales_that_are_not_of_the_named_blocks_are_refused(deepseek, tmp_path, block):
    """They are damaged, or the name is wrong: whatever divides evenly would be a guess."""
    path = Path(shutil.copytree(deepseek, tmp_path / "fp8"))
    store_fp8(path, (128, 128))
    add_blocks(path, (192, 128) if block == (64, 64) else (192, 96), block)
    said(path, weight_block_size=[64, 32])
    refused(path, FILE, "a.weight", "not the blocks of 64 × 32 that config.json's")


@pytest.mark.parametrize("named", [128, [128], [0, 4], [4.0, 4], ["4", "4"], {}, [True, 4]])
def test_a_block_that_is_none(fp8, named):
    refused(said(fp8, weight_block_size=named), "config.json", f"weight_block_size is {named!r}")


def test_mxfp4_is_what_it_was_made_to_be(gpt_oss, tmp_path):
    path, meant = gpt_oss
    found = read(path)
    assert len(meant) == 4 and found[FUSED].shape == (4, 32, 128)
    assert all(torch.equal(found[name], meant[name].to(torch.bfloat16)) for name in meant)
    assert torch.equal(streamed(path), streamed(store_plain(tmp_path / "plain", meant, path)))


def test_what_headers_say(fp8, deepseek):
    source, plain = Source(fp8), Source(deepseek)
    assert source.tensors.keys() == plain.tensors.keys()
    assert all(source.tensors[n].shape == plain.tensors[n].shape for n in plain.tensors)
    assert source.tensors[EXPERT].dtype == "BF16"
    assert source.stored_bytes(EXPERT) == 24 * 32 + 6 * 8 * 4  # numbers, and scales in float32
    assert source.stored_bytes("lm_head.weight") == 96 * 32 * 2
    assert source.nbytes == sum(map(source.stored_bytes, source.tensors))
    assert source.nbytes == sum(t.nbytes for t in load_file(fp8 / FILE).values())
    assert "quantization_config" not in source.config
    assert "quantization_config" in json.loads((fp8 / "config.json").read_text())
    assert source.quantised.label == "FP8"
    assert Source(deepseek).quantised is None


def test_the_dtype_is_that_of_the_configuration(fp8):
    assert Source(change_config(fp8, dtype="float32")).tensors[EXPERT].dtype == "F32"
    source = Source(change_config(fp8, dtype=None))
    assert source.tensors[EXPERT].dtype == "BF16" and source.config["torch_dtype"] == "bfloat16"
    assert StreamedModel(source).dtype == torch.bfloat16


# Forms of storage.


def test_other_names_and_forms_of_fp8(fp8):
    """Scales by other names, one for a whole matrix, of inputs; fused experts; exponents."""
    before = read(fp8)
    tensors = load_file(fp8 / FILE)
    up, down = EXPERT, EXPERT.replace("up_proj", "down_proj")
    tensors[up.replace("weight", "scale")] = tensors.pop(f"{up}_scale_inv")
    tensors[up.replace("weight", "activation_scale")] = torch.tensor(2.0)
    tensors[down] = torch.full((32, 24), 3.0).to(torch.float8_e4m3fn)
    tensors[f"{down}_scale_inv"] = torch.tensor(0.5)
    tensors["fused"] = torch.full((2, 8, 4), 2.0).to(torch.float8_e4m3fn)
    tensors["fused_scale_inv"] = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    tensors["small.weight"] = torch.ones(4, 4).to(torch.float8_e4m3fn)
    tensors["small.weight_scale_inv"] = torch.tensor([[128]], dtype=torch.uint8)
    save_file(tensors, fp8 / FILE)
    source, found = Source(fp8), read(fp8)
    assert torch.equal(found[up], before[up]) and up.replace("weight", "scale") not in found
    assert up.replace("weight", "activation_scale") not in source.tensors
    assert source.stored_bytes(up) == 24 * 32 + 6 * 8 * 4 + 4
    assert torch.equal(found[down], torch.full((32, 24), 1.5, dtype=torch.bfloat16))
    assert found["fused"][:, ::4, 0].tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert torch.equal(found["small.weight"], torch.full((4, 4), 2.0, dtype=torch.bfloat16))


def test_four_bits_a_number_under_the_names_of_fp8(fp8):
    """As DeepSeek-V4 stores its experts."""
    tensors = load_file(fp8 / FILE)
    numbers = torch.tensor([[0x21, 0x7F], [0x0A, 0x90]], dtype=torch.uint8)
    tensors["a.weight"] = numbers.view(torch.int8)
    tensors["a.scale"] = torch.tensor([[127], [129]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors, fp8 / FILE)
    expected = [[0.5, 1.0, -6.0, 6.0], [-4.0, 0.0, 0.0, -2.0]]
    assert read(fp8)["a.weight"].tolist() == expected
    assert Source(fp8).stored_bytes("a.weight") == 4 + 2


def test_the_smallest_and_the_largest_exponents():
    values = torch.tensor([[[[0x31] * 16]]], dtype=torch.uint8)
    for exponent in (0, 1, 127, 252):
        scales = torch.tensor([[[exponent]]], dtype=torch.uint8)
        found = from_mxfp4(values, scales, torch.float32)
        assert found.shape == (1, 32, 1)
        assert found[0, 0, 0] == 0.5 * 2.0 ** (exponent - 127)
        assert found[0, 1, 0] == 1.5 * 2.0 ** (exponent - 127)


def test_the_tests_own_quantisation_is_close():
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))
    numbers, factors, meant = to_fp8(weight, (8, 16))
    assert factors.shape == (3, 2)
    assert torch.equal(from_blocks(numbers, factors, (8, 16), torch.float32), meant)
    assert float((meant - weight).norm() / weight.norm()) < 0.05
    stack = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1))
    meant = to_mxfp4(stack)[2]
    assert 0.01 < float((meant - stack).norm() / stack.norm()) < 0.2


# What is refused.


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        StreamedModel(Source(path))
    for word in words:
        assert word in str(caught.value), caught.value


def test_scales_that_are_missing(fp8):
    tensors = load_file(fp8 / FILE)
    del tensors[f"{KV}_scale_inv"]
    save_file(tensors, fp8 / FILE)
    refused(fp8, FILE, KV, "its scales are not there", f"{KV}_scale_inv")


@pytest.mark.parametrize("shape", [(6, 8), (5,), (1, 5, 8), (0, 0)])
def test_scales_that_do_not_fit(fp8, shape):
    tensors = load_file(fp8 / FILE)
    tensors[f"{KV}_scale_inv"] = torch.ones(shape)
    save_file(tensors, fp8 / FILE)
    refused(fp8, FILE, KV, "[20, 32]", str(list(shape)))


def test_exponents_that_are_missing_or_do_not_fit(gpt_oss):
    path, _ = gpt_oss
    tensors = load_file(path / FILE)
    scales = tensors.pop(f"{FUSED}_scales")
    save_file(tensors, path / FILE)
    refused(path, FILE, f"{FUSED}_blocks", f"{FUSED}_scales is not there")
    tensors[f"{FUSED}_scales"] = scales[:, :5].contiguous()
    save_file(tensors, path / FILE)
    refused(path, FILE, f"{FUSED}_blocks", "[4, 128, 1, 16]", "[4, 5, 1]")


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_format_of_which_there_is_nothing(deepseek, tmp_path, method):
    path = Path(shutil.copytree(deepseek, tmp_path / "model"))
    change_config(path, quantization_config={"quant_method": method})
    refused(path, "config.json", f"quantization_config says '{method}'", "delete the key")


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "modelopt"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_formats(deepseek, tmp_path, method, inside):
    path = Path(shutil.copytree(deepseek, tmp_path / "model"))
    said = {"quantization_config": {"quant_method": method}}
    change_config(path, **({"text_config": said} if inside else said))
    refused(path, "config.json", "quantization_config", f"'{method}'", "bfloat16", "'fp8'")


SCALES = f"{EXPERT}_scale_inv"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "some are not finite"),
        (-0.01, r"some are negative \(the least is -0\.01\)"),
        (0.0, "some are 0, and their numbers are not"),
        (1e30, r"the largest, 1e\+30, makes weights of up to 4\.48e\+32"),
    ],
)
def test_scales_that_cannot_be_true(fp8, value, words):
    """Headers cannot tell; the first reading does, by tensor and file."""
    tensors = load_file(fp8 / FILE)
    tensors[SCALES][2, 3] = value
    save_file(tensors, fp8 / FILE)
    model = StreamedModel(Source(fp8))
    what = rf"{FILE}: tensor {SCALES}, the scales of {EXPERT}: {words}"
    with pytest.raises(CheckpointError, match=what), model.layer(1):
        pass


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_scales_of_blocks_of_zeros_may_be_anything(fp8, value):
    """What writers put there differs, and what it stands for does not."""
    tensors = load_file(fp8 / FILE)
    tensors[EXPERT].view(torch.uint8)[8:12, 12:16] = 0
    tensors[SCALES][2, 3] = value
    save_file(tensors, fp8 / FILE)
    assert not read(fp8)[EXPERT][8:12, 12:16].any()


@pytest.mark.parametrize(
    ("exponent", "words"), [(255, "some are not finite"), (200, r"9\.44e\+21, makes weights of up")]
)
def test_exponents_that_cannot_be_true(gpt_oss, exponent, words):
    path, _ = gpt_oss
    tensors = load_file(path / FILE)
    tensors[f"{FUSED}_scales"][1, 2, 0] = exponent
    save_file(tensors, path / FILE)
    with pytest.raises(CheckpointError, match=f"{FILE}: tensor {FUSED}_scales, .*{words}"):
        read(path)


def test_numbers_that_are_none(fp8):
    tensors = load_file(fp8 / FILE)
    tensors[EXPERT].view(torch.uint8)[2, 3] = 0x7F  # NaN in E4M3
    save_file(tensors, fp8 / FILE)
    model = StreamedModel(Source(fp8))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN"), model.layer(1):
        pass
