"""Whole checkpoints: loaded in fresh processes, with mctk and without; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from mctk.errors import CheckpointError, UserError
from mctk.runtime import GUARD, MctkConfig, TermLinear, checkpoint_config, load_providers
from mctk.runtime.quantizer import _sparing_terms
from mctk.terms import BankShape, Dense, kinds, registry
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming
from transformers.distributed import DistributedConfig

ALL = [*families.FAMILIES, "llama"]
SOME = ("mixtral", "gpt_oss", "deepseek_v3", "llama")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("check", ["load", "again"])
def test_fresh_process_loads(loaded, check, family):
    assert loaded[f"{check} {family}"] == "ok"


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("check", ["generate", "headless", "offloaded", "bfloat16"])
def test_fresh_process_runs(loaded, check, family):
    assert loaded[f"{check} {family}"] == "ok"


@pytest.mark.parametrize(
    "check", ["placed gpt_oss cpu", "placed deepseek_v3 auto", "other_implementation qwen3_moe"]
)
def test_fresh_process_options(loaded, check):
    assert loaded[check] == "ok"


@pytest.mark.parametrize("family", ALL)
def test_plain_transformers_refuses(plain, family):
    for message in (plain[family], plain[f"{family} headless"]):
        assert message.startswith("ValueError")
        assert "install mctk and 'import mctk' before loading it" in message


def test_tensor_names_stay_below_their_module(checkpoints):
    # mixtral and phimoe save under the original's names of the block; the rest must not move.
    for family in ALL:
        names = [n for n in load_file(checkpoints / family / "model.safetensors") if "terms_" in n]
        assert names
        for name in names:
            module, _, tensor = name.rpartition(".")
            assert tensor.startswith("terms_")
            assert module.endswith((".experts", "o_proj"))


def copy(checkpoints: Path, target: Path, family: str = "mixtral") -> Path:
    shutil.copytree(checkpoints / family, target)
    return target


def edit(directory: Path, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_missing_tensor_is_an_error(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    lost = next(name for name in sorted(tensors) if "experts.terms_down_0" in name)
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor .*experts\.terms_down_0_cols"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_index_out_of_range_is_an_error(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("_pivots"))
    tensors[name] = tensors[name] + 1000
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"module model\.layers\..*pivots"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_newer_format_is_refused(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")
    edit(directory, lambda config: config["quantization_config"].update(format_version=3))
    with pytest.raises(CheckpointError, match=r"format version 3.*install a newer mctk"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_missing_provider_is_named(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")
    edit(directory, lambda config: config["quantization_config"].update(providers=["mctk-none"]))
    with pytest.raises(CheckpointError, match="plugin 'mctk-none', which is not installed"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_installed_provider_brings_its_kinds(monkeypatch):
    class Scaled(Dense):
        kind = "scaled_for_test"

    class Point:
        name, dist = "mctk_scaled", None

        def load(self):
            return SimpleNamespace(kinds=lambda: [Scaled])

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point()])
    monkeypatch.setattr("mctk.terms.registry._kinds", dict(registry._kinds))
    load_providers(["mctk_scaled"])
    assert kinds()["scaled_for_test"] == "mctk_scaled"
    term = Scaled(BankShape(1, 5, 6), [0], torch.ones(1, 5, 6))
    assert term.spec()["provider"] == "mctk_scaled"
    linear = TermLinear(6, 5, [term.spec()])
    linear.set_terms("linear", [term])
    assert torch.equal(linear(torch.ones(2, 6)), torch.full((2, 5), 6.0))


def test_saving_leaves_the_names_of_terms_alone():
    # A pattern may end before the dot of the terms' names, or with it.
    for there, here in (("wide", "gate_proj"), (r"\.wide\.", ".gate_proj.")):
        conversion = _sparing_terms(WeightRenaming(there, here))
        assert isinstance(conversion, WeightRenaming)  # loading asks: prediction layers come later
        found = conversion.reverse_transform().compiled_sources
        assert not found.search("layers.0.mlp.gate_proj.terms_0_U")
        assert found.search("layers.0.mlp.gate_proj.weight")


def test_broken_provider_is_named(monkeypatch):
    class Point:
        name, dist = "mctk_broken", None

        def load(self):
            raise ImportError("no module named 'triton'")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point()])
    with pytest.raises(CheckpointError, match=r"'mctk_broken', which cannot be imported: .*triton"):
        load_providers(["mctk_broken"])


def test_unknown_module_is_named(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")

    def move(config):
        modules = config["quantization_config"]["modules"]
        modules["model.layers.7.mlp.experts"] = modules.pop("model.layers.0.mlp.experts")

    edit(directory, move)
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.experts: .*no such module"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_loading_does_not_compress(tmp_path):
    families.tiny("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the model is not compressed"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MctkConfig())


def test_guard_of_another_version_is_recognised(checkpoints, tmp_path):
    directory = copy(checkpoints, tmp_path / "model")
    edit(directory, lambda config: config.update(experts_implementation="mctk: other words"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.config._experts_implementation == "mctk"


def test_config_keeps_every_key_of_the_source():
    source = {"model_type": "mixtral", "rope_theta": 1e6, "auto_map": {"a": "b"}}
    config = checkpoint_config(source, {"m": {"type": "linear", "terms": []}}, ["plugin"], "svd")
    assert config == {
        **source,
        "experts_implementation": GUARD,
        "quantization_config": {
            "quant_method": "mctk",
            "format_version": 2,
            "modules": {"m": {"type": "linear", "terms": []}},
            "providers": ["plugin"],
            "method": "svd",
        },
    }
    json.dumps(config)


def test_unknown_key_of_the_config_is_named():
    with pytest.raises(CheckpointError, match=r"unknown key 'module' \(did you mean 'modules'"):
        MctkConfig(module={})


def test_saving_a_config_alone_keeps_the_guard(checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "olmoe")
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["experts_implementation"] == GUARD
    config = AutoConfig.from_pretrained(tmp_path)
    assert config._experts_implementation == GUARD
    # A model of that configuration can be built, as for any other checkpoint.
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def test_config_of_a_loaded_model_loads_again(checkpoints):
    first = AutoModelForCausalLM.from_pretrained(checkpoints / "olmoe")
    second = AutoModelForCausalLM.from_pretrained(checkpoints / "olmoe", config=first.config)
    assert any("terms_" in name for name in second.state_dict())


def test_parallel_loading_is_refused(checkpoints):
    with pytest.raises(UserError, match="tensor or expert parallel"):
        AutoModelForCausalLM.from_pretrained(
            checkpoints / "olmoe", distributed_config=DistributedConfig(tp_plan="auto")
        )


def test_adapters_on_a_loaded_model_get_gradients(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "mixtral")
    embeddings = model.get_input_embeddings().weight
    assert model.hf_quantizer.is_trainable
    model(families.token_ids()).logits.square().mean().backward()
    assert embeddings.grad is not None and bool(embeddings.grad.abs().sum() > 0)
    assert all(p.grad is None for n, p in model.named_parameters() if "terms_" in n)
