"""What is wrong with a model directory is found before weights are read, and said by name."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import time
from pathlib import Path

import families
import pytest
import torch
from mctk.checkpoint import Source, map_weights, read_header
from mctk.errors import CheckpointError, UserError
from mctk.models import build, load_config
from mctk.sweep import StreamedModel
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def save(path: Path, family: str = "mixtral", shard: str = "40KB", **changes: object) -> Path:
    families.tiny(family, **changes).save_pretrained(path, max_shard_size=shard)
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        "sharded": save(root / "sharded"),
        "single": save(root / "single", shard="1GB"),
        "gpt_oss": save(root / "gpt_oss", "gpt_oss"),
    }


@pytest.fixture
def sharded(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["sharded"], tmp_path / "model"))


@pytest.fixture
def single(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["single"], tmp_path / "model"))


def refused(path: Path, *words: str, error: type[UserError] = CheckpointError) -> str:
    """Opens the model; returns the one line that it is refused with. Nothing may be written."""

    def state() -> dict:
        return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in path.iterdir()}

    before = state()
    with pytest.raises(error) as caught:
        StreamedModel(Source(path))
    assert state() == before
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def edit(path: Path, **changes: object) -> Path:
    """Changes keys of config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Changes tensors of a single-file checkpoint; None removes one."""
    file = path / "model.safetensors"
    tensors = {k: v for k, v in {**load_file(file), **changes}.items() if v is not None}
    save_file(tensors, file, {"format": "pt"})
    return path


def index_of(path: Path) -> dict[str, str]:
    return json.loads((path / INDEX).read_text())["weight_map"]


def write_index(path: Path, weight_map: object) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_header(path: Path, header: object, payload: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


# Files.


def test_a_good_directory_is_read(originals):
    sharded, single = Source(originals["sharded"]), Source(originals["single"])
    assert len(sharded.files) > 2
    assert sharded.tensors.keys() == single.tensors.keys()
    assert sharded.nbytes == single.nbytes == sum(t.numel * 4 for t in single.tensors.values())
    expected = load_file(originals["single"] / "model.safetensors")
    with sharded.slices(list(expected)) as slices:
        assert all(torch.equal(slices[name][...], tensor) for name, tensor in expected.items())


def test_no_config(sharded):
    (sharded / "config.json").unlink()
    refused(sharded, str(sharded), "no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "[" * 100_000, "\udcff"])
def test_bad_config(sharded, text):
    (sharded / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(sharded, "config.json")


def test_truncated_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    last = list(read_order(file))[-1]
    refused(sharded, file.name, "truncated", last)


def read_order(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_shard_cut_within_its_header(sharded, size):
    file = sorted(sharded.glob("*.safetensors"))[0]
    with file.open("r+b") as handle:
        handle.truncate(size)
    refused(sharded, file.name, "not a safetensors file")


def test_trailing_bytes(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    with file.open("ab") as handle:
        handle.write(b"1234")
    refused(sharded, file.name, "4 bytes that no tensor owns")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"garbage!", "not a safetensors file"),
        (b"\xff\xfe\xfd", "not a safetensors file"),
        (b"[" * 100_000, "not a safetensors file"),
        ([1, 2], "no JSON object"),
        ({"a": 1}, "malformed safetensors header"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "malformed safetensors header"),
        ({"a": {**GOOD, "data_offsets": [0]}}, "malformed safetensors header"),
        ({"a": {**GOOD, "data_offsets": ["0", "8"]}}, "tensor a"),
        ({"a": {**GOOD, "dtype": "F7"}}, "tensor a has unknown type F7"),
        ({"a": {**GOOD, "shape": [-1, -2]}}, "tensor a: [-1, -2] is no shape"),
        ({"a": {**GOOD, "shape": [3]}}, "tensor a: offsets contradict its shape"),
        ({"a": GOOD, "b": GOOD}, "offsets contradict its shape"),
        ({"a": {**GOOD, "data_offsets": [8, 16]}}, "tensor a: offsets contradict its shape"),
    ],
)
def test_header_garbage(tmp_path, header, words):
    path = write_header(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_empty_tensors_are_no_garbage(tmp_path):
    save_file({"b": torch.zeros(0, 3), "a": torch.ones(2)}, tmp_path / "x.safetensors")
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(tmp_path / "y.safetensors", {"a": GOOD, "b": entry}, bytes(8))
    assert read_header(tmp_path / "x.safetensors")["b"].nbytes == 0
    assert list(read_header(tmp_path / "y.safetensors")) == ["b", "a"]


def test_missing_tensor_of_the_index(sharded):
    weights = index_of(sharded)
    write_index(sharded, {**weights, "model.extra.weight": weights[EXPERT]})
    refused(sharded, weights[EXPERT], "model.extra.weight is missing; the index names it")


def test_tensor_that_lies_in_another_file_than_the_index_says(sharded):
    weights = index_of(sharded)
    other = next(file for file in sorted(weights.values()) if file != weights[EXPERT])
    write_index(sharded, {**weights, EXPERT: other})
    refused(sharded, other, EXPERT, "missing")


def test_tensor_in_two_files(sharded):
    weights = index_of(sharded)
    other = next(file for file in sorted(set(weights.values())) if file > weights[EXPERT])
    tensors = load_file(sharded / other)
    save_file({**tensors, EXPERT: torch.zeros(24, 32)}, sharded / other, {"format": "pt"})
    refused(sharded, other, f"{EXPERT} is in {weights[EXPERT]} too")


def test_tensor_that_the_index_leaves_out_counts_as_it_does_for_transformers(sharded):
    weights = index_of(sharded)
    del weights[EXPERT]
    write_index(sharded, weights)
    assert EXPERT in Source(sharded).tensors


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", 3, None]
)
def test_index_leading_outside(sharded, file):
    write_index(sharded, {**index_of(sharded), EXPERT: file})
    refused(sharded, INDEX, EXPERT, repr(file), "outside the model directory")


def test_index_naming_no_safetensors_file(sharded):
    write_index(sharded, {**index_of(sharded), EXPERT: "config.json"})
    refused(sharded, INDEX, "config.json is no safetensors file")


def test_index_naming_a_file_that_is_not_there(sharded):
    file = index_of(sharded)[EXPERT]
    (sharded / file).unlink()
    refused(sharded, file, "the file is missing")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [["a", "b"]]}'])
def test_bad_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX, "malformed index")


def test_pickle_only(single):
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(single, "pickle (pytorch_model.bin)", "safetensors")


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, str(single), "holds neither")


def test_the_single_file_counts_before_an_index_as_it_does_for_transformers(single):
    write_index(single, {EXPERT: "nowhere.safetensors"})
    assert Source(single).files == ["model.safetensors"]


# Tensors against config.json.


def test_wrong_hidden_size(single):
    edit(single, hidden_size=48)
    refused(
        single,
        "model.safetensors: tensor lm_head.weight gives lm_head.weight the shape (96, 32)",
        "config.json says (96, 48)",
    )


def test_one_experts_tensor_missing(single):
    rewrite(single, {EXPERT: None})
    refused(single, "model.safetensors", f"tensor {EXPERT} is missing", "4 experts")


def test_one_experts_tensors_all_missing(single):
    names = [EXPERT.replace("w1", w) for w in ("w1", "w2", "w3")]
    rewrite(single, dict.fromkeys(names))
    refused(single, "is missing", ".experts.2.", "asks for 4 experts")


def test_more_experts_than_there_are(single):
    edit(single, num_local_experts=6)
    refused(single, "layers.0.block_sparse_moe.experts.4.w", "(and 1 more)", "asks for 6 experts")


def test_fewer_experts_than_there_are(single):
    edit(single, num_local_experts=3)
    refused(single, "layers.0.block_sparse_moe.experts.3.w", "one too many", "3 experts")


def test_one_experts_tensor_of_another_shape(single):
    rewrite(single, {EXPERT: torch.zeros(20, 32)})
    refused(single, EXPERT, "[20, 32]", "[24, 32]")


def test_all_gates_missing(single):
    names = [n for n in Source(single).tensors if ".layers.1." in n and n.endswith("w1.weight")]
    rewrite(single, dict.fromkeys(names))
    refused(single, "layers.1.", "experts", "not complete")


def test_fused_experts_of_another_number(originals, tmp_path):
    path = Path(shutil.copytree(originals["gpt_oss"], tmp_path / "model"))
    edit(path, num_local_experts=5)
    refused(path, "model.layers.0.mlp", "config.json", "5")


def test_a_layer_more_than_there_is(single):
    edit(single, num_hidden_layers=3)
    refused(single, "no tensor for model.layers.2.", "config.json")


def test_an_ordinary_tensor_missing(single):
    rewrite(single, {"model.norm.weight": None})
    refused(single, "no tensor for model.norm.weight")


def test_tensors_that_nothing_reads_are_listed(single):
    extra = {"model.mtp.proj.weight": torch.zeros(3, 3), "junk": torch.zeros(2)}
    rewrite(single, extra)
    model = StreamedModel(Source(single))
    assert sorted(model.weights.unread) == sorted(extra)
    assert not set(extra) & {*model.outer_tensors, *itertools.chain(*model.layer_tensors)}


# Numbers.


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_values_that_are_no_numbers_are_found_when_a_layer_is_filled(single, value, word):
    tensor = load_file(single / "model.safetensors")[EXPERT]
    tensor[3, 5] = value
    model = StreamedModel(Source(rewrite(single, {EXPERT: tensor})))
    with model.layer(0):
        pass
    with pytest.raises(CheckpointError) as caught, model.layer(1):
        pass
    assert str(caught.value) == f"{single / 'model.safetensors'}: tensor {EXPERT} holds {word}"
    assert all(p.is_meta for p in model.layers[1].parameters())


def test_nan_in_the_embeddings(single):
    name = "model.embed_tokens.weight"
    tensor = load_file(single / "model.safetensors")[name]
    tensor[7] = float("nan")
    model = StreamedModel(Source(rewrite(single, {name: tensor})))
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        model.load_outer()


def test_overflow_in_the_compute_dtype(single):
    tensor = load_file(single / "model.safetensors")[EXPERT]
    tensor[0, 0] = 1e6
    model = StreamedModel(Source(rewrite(single, {EXPERT: tensor})), dtype="float16")
    with pytest.raises(CheckpointError, match=r"w1\.weight overflows in float16"), model.layer(1):
        pass


def test_a_file_that_is_cut_after_it_was_opened(single):
    model = StreamedModel(Source(single))
    with (single / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with (
        pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"),
        model.layer(1),
    ):
        pass
    assert all(p.is_meta for p in model.layers[1].parameters())


# Kinds that are refused.


def test_remote_code_unasked(single):
    edit(single, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling.Homemade"})
    (single / "modeling.py").write_text("raise SystemExit('ran')")
    refused(single, "config.json", "trust-remote-code")


def test_unknown_model_type(single):
    edit(single, model_type="homemade")
    refused(single, "config.json", "'homemade' is unknown")
    edit(single, model_type=["mixtral"])
    refused(single, "config.json", "unknown")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("quantization_config", {"quant_method": "fp8"}, "'fp8'"),
        ("quantization_config", {"load_in_4bit": True}, "'unknown'"),
        ("quantization_config", "awq", "'awq'"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ],
)
def test_quantised_sources(single, key, value, word):
    edit(single, **{key: value})
    refused(single, "config.json", key, word, "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised_tensors_without_a_word_in_the_config(single, dtype):
    rewrite(single, {EXPERT: torch.zeros(24, 32).to(dtype)})
    refused(single, "model.safetensors", EXPERT, "quantised")


def test_a_configuration_that_transformers_does_not_take(single):
    edit(single, hidden_act="no_such_activation")
    refused(single, "mixtral", "no_such_activation", error=UserError)


def test_a_model_without_a_causal_language_model(single):
    edit(single, model_type="vit")
    refused(single, "vit", error=UserError)


# Tied weights.


def test_a_head_that_is_tied_and_stored_twice(tmp_path):
    path = save(tmp_path / "model", "granitemoe", "1GB")
    embeddings = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, {"lm_head.weight": embeddings.clone()})
    model = StreamedModel(Source(path))
    assert model.weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in model.outer_tensors
    model.load_outer()
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


def test_a_head_that_should_be_tied_and_differs(tmp_path):
    path = save(tmp_path / "model", "granitemoe", "1GB")
    embeddings = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(path, {"lm_head.weight": embeddings + 1})
    model = StreamedModel(Source(path))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight differs from .*embed"):
        model.load_outer()


# The weight map.


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_tensor_has_its_place(tmp_path, family):
    source = Source(save(tmp_path / family, family, "1GB"))
    model = build(load_config(source.path, source.config, False), torch.float32)
    weights = map_weights(model, source)
    assert not weights.unread
    fed = {target for targets in weights.targets.values() for target in targets}
    missing = set(dict(model.named_parameters())) - fed
    assert not missing - {"lm_head.weight"}  # tied, in one family
    layers, outer = weights.place("model.layers", model.config.num_hidden_layers)
    everything = [name for names in [*layers, outer] for name in names]
    assert sorted(everything) == sorted(weights.targets)
    assert all(f".layers.{i}." in name for i, names in enumerate(layers) for name in names)


# Identity and place.


def test_the_fingerprint_changes_with_any_byte(single, tmp_path, monkeypatch):
    monkeypatch.setattr("mctk.checkpoint.source.SETTLED", 0)
    cache = tmp_path / "cache"
    first = Source(single).fingerprint(cache)
    assert Source(single).fingerprint(cache) == first
    assert len(list((cache / "fingerprints").iterdir())) == 1
    file = single / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    times = file.stat()
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying tool may leave it
    changed = Source(single).fingerprint(cache)
    assert changed != first
    data[-1] ^= 1
    file.write_bytes(data)
    assert Source(single).fingerprint(cache) == first
    edit(single, rope_theta=5.0)
    assert Source(single).fingerprint(cache) not in (first, changed)


def test_the_fingerprint_covers_code_that_the_model_brings(single, tmp_path):
    first = Source(single).fingerprint(tmp_path / "cache")
    (single / "modeling.py").write_text("x = 1")
    assert Source(single).fingerprint(tmp_path / "cache") != first


def test_the_fingerprint_is_recorded_only_once_files_have_settled(single, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    (single / "model.safetensors").touch()
    first = Source(single).fingerprint(cache)
    assert not (cache / "fingerprints").exists()
    later = time.time_ns() + 10_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert Source(single).fingerprint(cache) == first
    assert (cache / "fingerprints").exists()
    monkeypatch.setattr("hashlib.file_digest", None)  # a second time nothing is hashed
    assert Source(single).fingerprint(cache) == first
