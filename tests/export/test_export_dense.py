"""Dense exports: the original's names, its config.json, and the compressed model's logits."""

from __future__ import annotations

import contextlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from mctk.checkpoint import Source, read_header
from mctk.engine import run
from mctk.errors import UserError
from mctk.export import export, layout, write
from mctk.recipe import load_recipe
from mctk.registry import load_plugins
from safetensors.torch import load_file, save_file
from torch import nn

from tests.families import save_remote, tiny, token_ids
from tests.native import plain_logits
from tests.quantised_checkpoint import add_predictor
from tests.runtime.compression import (
    compress,
    compress_mixed,
    compressible,
    exact_terms,
    random_terms,
    some_packed,
)
from tests.runtime.compression import write as write_compressed

REGISTRY = load_plugins()


def compressed(family: str, directory: Path) -> torch.Tensor:
    """Writes a model of bases, low rank, merged experts, sparse and packed terms; its logits."""
    model = tiny(family, **({} if family == "gpt_oss" else {"num_hidden_layers": 3}))
    if family != "llama":
        model.set_experts_implementation("mctk")
    if family == "gpt_oss":  # has biases, where constants find a place
        described = compress_mixed(model)
    else:
        chosen = {}
        for seed, (path, module) in enumerate(list(compressible(model).items())[:-1]):
            exact = exact_terms(module)
            terms = random_terms(exact, seed)
            if "down" in terms:
                terms["down"] = random_terms(exact, 2 * seed)["down"]
            chosen[path] = some_packed(terms, seed)
        described = compress(model, chosen)
    write_compressed(model, described, directory)
    with torch.no_grad():
        return model(token_ids(), use_cache=False).logits


def names(directory: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    source = Source(directory)
    return {name: (info.dtype, info.shape) for name, info in source.tensors.items()}


FAMILIES = ["mixtral", "deepseek_v3", "qwen3_moe", "granitemoe", "gpt_oss", "llama"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Family → the export, what it was told, the compressed model's logits, plain transformers'."""
    root = tmp_path_factory.mktemp("dense")
    found = {}
    for family in FAMILIES:
        logits = compressed(family, root / f"{family}-small")
        tiny(family, **({} if family == "gpt_oss" else {"num_hidden_layers": 3})).save_pretrained(
            root / f"{family}-original"
        )
        result = export(root / f"{family}-small", root / family)
        found[family] = [root, result, logits]
    plain = plain_logits([root / family for family in FAMILIES], token_ids())
    for family, logits in zip(FAMILIES, plain, strict=True):
        found[family].append(logits)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_gives_the_compressed_models_logits(exported, family):
    root, result, before, after = exported[family]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert result.difference.median < 1e-5 and result.difference.same_choice == 1
    # The files are what transformers writes of the original: an expert at a time where it does so.
    assert names(root / family) == names(root / f"{family}-original")
    settings = [
        json.loads((root / name / "config.json").read_text())
        for name in (family, f"{family}-original")
    ]
    assert settings[0] == settings[1]
    assert result.modules == len(
        Source(root / f"{family}-small").config["quantization_config"]["modules"]
    )


def test_what_is_said_of_terms(exported):
    notes = "\n".join(exported["mixtral"][1].notes)
    assert "matrices that experts share: the dense form holds a copy for each" in notes
    assert "packed weights" in notes


def go(path: Path, cache: Path) -> Path:
    recipe = load_recipe(path, registry=REGISTRY)
    run([recipe], REGISTRY, cache=cache)
    return Path(recipe.output)


def test_a_run_in_bfloat16(mixtral, write_recipe, cache, tmp_path):
    """The tensors' dtype, untouched ones bit by bit, tokenizer, model card; another dtype."""
    small = go(write_recipe(steps=[{"decompose": "svd", "options": {"rank_multiple": 1}}]), cache)
    result = export(small, tmp_path / "dense")
    assert names(tmp_path / "dense") == names(mixtral)
    read = {f: load_file(tmp_path / "dense" / f) for f in Source(tmp_path / "dense").files}
    ours = {name: tensor for tensors in read.values() for name, tensor in tensors.items()}
    theirs = {n: t for f in Source(mixtral).files for n, t in load_file(mixtral / f).items()}
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert {name for name in ours if name not in same} == {n for n in ours if ".experts." in n}
    assert 1e-5 < result.difference.median < result.difference.allowed
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    card = (tmp_path / "dense" / "README.md").read_text()
    assert card.startswith("---\n") and "**Multiplied out.**" in card and "import mctk" not in card
    assert ".from_pretrained(path)" in card and "import mctk" in (small / "README.md").read_text()
    exact = export(small, tmp_path / "exact", dtype=torch.float32)
    assert exact.difference.median < 1e-5
    assert json.loads((tmp_path / "exact" / "config.json").read_text())["dtype"] == "float32"
    down = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert names(tmp_path / "exact")[down][0] == "F32"


def test_what_is_skipped_at_run_time_is_computed(write_recipe, cache, tmp_path):
    steps = [
        {"merge": "mean"},
        {"decompose": "delta_svd", "size": {"keep": 0.3}, "options": {"rank_multiple": 1}},
        {"prune": "semi_dynamic", "options": {"static": 0.1, "dynamic": 0.3}},
        {"prune": "skip_experts"},
    ]
    small = go(write_recipe(budget=None, steps=steps), cache)
    result = export(small, tmp_path / "dense")
    assert any("computes all channels" in note for note in result.notes)
    assert any("skipped at run time" in note for note in result.notes)
    assert result.difference.is_rounding
    assert result.difference.skipping > 3 * result.difference.median


def test_experts_in_a_list_and_code_of_the_models_own(tmp_path, cache, write_recipe):
    model = save_remote(tmp_path / "remote")
    steps = [{"decompose": "svd", "size": {"rank": 4}}]
    recipe = write_recipe(
        model=str(model), trust_remote_code=True, calibration=None, budget=None, steps=steps
    )
    small = go(recipe, cache)
    with pytest.raises(UserError, match="trust-remote-code"):
        export(small, tmp_path / "dense")
    result = export(small, tmp_path / "dense", trust_remote_code=True)
    assert result.difference.is_rounding
    assert names(tmp_path / "dense") == names(model)
    assert (tmp_path / "dense" / "modeling_deepseek.py").exists()
    original = json.loads((model / "config.json").read_text())
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == original


def test_fewer_experts_and_low_rank_attention(mixtral, write_recipe, cache, tmp_path):
    """What config.json can say stays: equally many experts in every layer."""
    steps = [
        {"prune": "frequency", "size": {"rank": 3}},
        {"decompose": "svd", "targets": "attention.*", "size": {"keep": 0.8},
         "options": {"rank_multiple": 1}},
    ]  # fmt: skip
    small = go(write_recipe(budget=None, steps=steps), cache)
    result = export(small, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    experts = {name for name in names(tmp_path / "dense") if ".experts." in name}
    assert len(experts) == 3 * 3 * 3 and experts < set(names(mixtral))
    assert result.difference.is_rounding


def test_layers_for_multi_token_prediction(tmp_path):
    """They are copied, unless they have more experts than config.json says."""
    model = tiny("deepseek_v3")
    path = "model.layers.0.self_attn.o_proj"
    described = compress(model, {path: exact_terms(model.get_submodule(path))})
    write_compressed(model, described, tmp_path / "small")
    added = set(add_predictor(tmp_path / "small", len(model.model.layers)))
    result = export(tmp_path / "small", tmp_path / "kept")
    assert added <= set(names(tmp_path / "kept")) and not result.notes
    weights = load_file(tmp_path / "small" / "model.safetensors")
    expert = next(name for name in sorted(added) if ".experts.0." in name)
    weights[expert.replace(".experts.0.", ".experts.8.")] = weights[expert].clone()
    save_file(weights, tmp_path / "small" / "model.safetensors", {"format": "pt"})
    result = export(tmp_path / "small", tmp_path / "left")
    assert not added & set(names(tmp_path / "left"))
    assert [note.partition(",")[0] for note in result.notes] == [
        "layers for multi-token prediction"
    ]
    config = json.loads((tmp_path / "left" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


def test_what_lies_outside_the_layers_is_copied_a_tensor_at_a_time(tmp_path, monkeypatch):
    """Vision towers and prediction layers may together be larger than any layer."""
    model = tiny("deepseek_v3")
    path = "model.layers.0.self_attn.o_proj"
    described = compress(model, {path: exact_terms(model.get_submodule(path))})
    write_compressed(model, described, tmp_path / "small")
    added = add_predictor(tmp_path / "small", len(model.model.layers))
    alive: list[int] = []
    slices = Source.slices

    @contextlib.contextmanager
    def watched(self, names, *given):
        read: list[weakref.ref] = []

        def watch(part):
            class Watch:
                def __getitem__(self, index):
                    tensor = part[index]
                    read.append(weakref.ref(tensor))
                    alive.append(sum(ref() is not None for ref in read))
                    return tensor

            return Watch()

        with slices(self, names, *given) as found:
            outer = set(added) <= set(found)
            yield {name: watch(part) for name, part in found.items()} if outer else found

    monkeypatch.setattr(Source, "slices", watched)
    export(tmp_path / "small", tmp_path / "dense")
    assert len(alive) >= len(added) and max(alive) <= 2
    monkeypatch.undo()
    before = load_file(tmp_path / "small" / "model.safetensors")
    with Source(tmp_path / "dense").slices(added) as after:
        assert all(torch.equal(before[name], after[name][...]) for name in added)


# What is refused, before any weight is read.


@pytest.fixture
def no_reading(monkeypatch):
    def read(self, names):
        raise AssertionError(f"weights were read: {list(names)[:3]}")

    monkeypatch.setattr(Source, "slices", read)


def edited(mixtral: Path, target: Path, **keys: object) -> Path:
    target.mkdir()
    for file in mixtral.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    config = json.loads((mixtral / "config.json").read_text()) | keys
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_originals_and_others_formats_are_refused(mixtral, tmp_path, no_reading):
    with pytest.raises(UserError, match="holds no terms and loads without mctk as it is"):
        export(mixtral, tmp_path / "dense")
    other = edited(mixtral, tmp_path / "awq", quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="quantised by 'awq', not made by mctk"):
        export(other, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq"]


def test_layers_of_different_numbers_of_experts_are_refused(
    write_recipe, cache, tmp_path, monkeypatch
):
    steps = [{"prune": "frequency", "layers": 0, "size": {"rank": 3}}]
    small = go(write_recipe(budget=None, steps=steps), cache)
    with pytest.raises(UserError, match=r"different numbers of experts \(model.layers.0: 3\)"):
        export(small, tmp_path / "dense")


def test_constants_have_no_dense_form(tmp_path, no_reading):
    model = tiny("mixtral", num_hidden_layers=3)
    model.set_experts_implementation("mctk")
    write_compressed(model, compress_mixed(model), tmp_path / "small")
    with pytest.raises(UserError, match=r"multiplied out; export it with --expert-subst"):
        export(tmp_path / "small", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama") / "small"
    compressed("llama", directory)
    return directory


def test_a_full_disk_is_seen_before(llama, tmp_path, monkeypatch, no_reading):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"dense: needs 0\.0 GB, and .* has 0\.0 GB free"):
        export(llama, tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_output_at_a_time(tmp_path):
    """The second is refused, and does not take away what the first has written."""
    output = tmp_path / "dense"
    with write.building(output) as place:
        (place / "first").write_text("mine")
        with pytest.raises(UserError, match="another export is at work"), write.building(output):
            pass
        assert (place / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert (output / "first").exists()


def test_an_existing_output_is_not_touched(llama, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(llama, tmp_path / "dense")
    assert [path.name for path in (tmp_path / "dense").iterdir()] == ["mine"]


def test_wrong_logits_are_found_and_nothing_is_kept(llama, tmp_path, monkeypatch):
    """A matrix that is off by 5 % is beyond rounding to any dtype."""

    def wrong(dense, layer, prefix, modules):
        found = layout.restored(dense, layer, prefix, modules)
        return {name: 1.05 * t if prefix.endswith(".0.") else t for name, t in found.items()}

    monkeypatch.setattr(write, "restored", wrong)
    with pytest.raises(UserError, match=r"gives other logits than .*nothing was kept"):
        export(llama, tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_an_export_that_stops_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(llama, tmp_path / "dense")
    assert not list(tmp_path.iterdir())


def test_values_that_do_not_fit_are_named(tmp_path):
    model = tiny("llama")
    nn.init.constant_(model.model.layers[0].self_attn.o_proj.weight, 1e6)
    path = "model.layers.0.self_attn.o_proj"
    described = compress(model, {path: exact_terms(model.get_submodule(path))})
    write_compressed(model, described, tmp_path / "small")
    with pytest.raises(UserError, match=r"o_proj.weight: does not fit into float16; give --dtype"):
        export(tmp_path / "small", tmp_path / "dense", dtype=torch.float16)
    assert not (tmp_path / "dense").exists()


def test_the_index_is_whole(exported):
    root = exported["mixtral"][0]
    index = json.loads((root / "mixtral" / "model.safetensors.index.json").read_text())
    files = sorted((root / "mixtral").glob("*.safetensors"))
    held = {name: file.name for file in files for name in read_header(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == Source(root / "mixtral").nbytes
