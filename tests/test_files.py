"""Files are there whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from mctk.files import file_digest, write_json, write_tensors, write_text
from safetensors.torch import load_file


def test_what_is_written_is_read(tmp_path):
    write_text(tmp_path / "a.txt", "größer")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "größer"
    write_json(tmp_path / "a.json", {"b": 1, "a": ["×"]})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["b", "a"]
    tensors = {"x": torch.randn(3, 4).T, "y": torch.arange(6).view(2, 3)[:, 1:]}
    write_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors", "a.txt"]


def test_the_bytes_do_not_depend_on_the_time(tmp_path):
    tensors = {"x": torch.ones(3), "y": torch.zeros(2)}
    write_tensors(tmp_path / "a", tensors, {"layer": "1"})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"layer": "1"})
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space"):
        write_json(path, 2)
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path / "b", {"x": torch.ones(2)})
    assert json.loads(path.read_text()) == 1
    assert os.listdir(tmp_path) == ["a.json"]
