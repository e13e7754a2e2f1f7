"""Files are there whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from mctk.dtypes import DTYPES, torch_dtypes
from mctk.files import file_digest, write_json, write_tensors, write_text
from safetensors import safe_open
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


def test_every_dtype_is_copied_bit_by_bit(tmp_path):
    known = torch_dtypes()
    sizes = {dtype.name: dtype.nbytes for dtype in DTYPES}
    assert sizes == {name: dtype.itemsize for name, dtype in known.items()}
    assert len(set(known.values())) == len(DTYPES) == 19
    given = {
        name: (torch.arange(6 * dtype.itemsize) % 2).to(torch.uint8).view(dtype).view(2, 3)
        for name, dtype in known.items()
    }
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in given.items()}
    write_tensors(tmp_path / "a", empty, read=given.__getitem__)
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        for name, tensor in given.items():
            piece = file.get_slice(name)
            assert piece.get_dtype() == name and piece[...].dtype == tensor.dtype
            assert torch.equal(piece[...].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "found", [torch.ones(2, 3, dtype=torch.int32), torch.ones(3, 2), torch.ones(7)]
)
def test_what_is_read_is_what_was_said(tmp_path, found):
    empty = {"x": torch.empty(2, 3, device="meta")}
    with pytest.raises(ValueError, match=r"tensor x was to be torch\.float32 \[2, 3\], and is "):
        write_tensors(tmp_path / "a", empty, read=lambda name: found)
    assert os.listdir(tmp_path) == []
