"""A hub model is planned from its headers; its weights are downloaded only to be read."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from mctk.checkpoint import open_source, read_header
from mctk.errors import CheckpointError, UserError

from tests.families import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub with one model; records what was asked for."""
    stored, asked = tmp_path / "stored", []
    tiny("mixtral").save_pretrained(stored, max_shard_size="20kB")

    def snapshot(model, revision, allow_patterns):
        asked.append((model, revision, "*.safetensors" in allow_patterns))
        folder = tmp_path / f"snapshot{len(asked)}"
        shutil.copytree(stored, folder)
        if "*.safetensors" not in allow_patterns:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        return str(folder)

    def metadata(self, model, revision):
        files = {file.name: read_header(file) for file in stored.glob("*.safetensors")}
        return SimpleNamespace(
            files_metadata={name: SimpleNamespace(tensors=found) for name, found in files.items()}
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", metadata)
    return asked


def test_a_plan_downloads_no_weights(hub):
    planned = open_source("owner/name", "main", weights=False)
    read = open_source("owner/name", "main")
    assert [weights for _, _, weights in hub] == [False, True]
    assert planned.tensors == read.tensors and planned.files == read.files
    assert not list(Path(planned.path).glob("*.safetensors"))


def test_a_type_that_cannot_be_read_is_refused_before_the_download(hub, monkeypatch):
    tensors = {"a": SimpleNamespace(dtype="F4", shape=[2, 4])}
    found = SimpleNamespace(files_metadata={"b.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, model, revision: found
    )
    with pytest.raises(CheckpointError, match=r"owner/name: b\.safetensors: tensor a .* type F4"):
        open_source("owner/name", weights=False)


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError("404: no such model\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(UserError, match=r"owner/nam is no directory.*404: no such model and more$"):
        open_source("owner/nam")


@pytest.mark.parametrize("model", ["./missing", "/nowhere/model", "a/b/c"])
def test_a_path_is_never_looked_up_on_the_hub(model):
    with pytest.raises(UserError, match="no directory"):
        open_source(model)
