"""A hub model is read at one commit; only what is needed is downloaded, for a plan no weights."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from mctk.checkpoint import open_source, read_header
from mctk.errors import CheckpointError, UserError
from mctk.hub import HubError, is_name, near_directory, split_revision

from tests.families import tiny
from tests.hub_cache import cache_model

OTHER_FILES = (
    "pytorch_model.bin", "consolidated.00.pth", "original/params.json",
    "original/model.safetensors", "consolidated.safetensors", "onnx/config.json",
)  # fmt: skip
NAMES = ("model.safetensors.index.json", "config.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    tiny("mixtral").save_pretrained(directory, max_shard_size="20kB")
    return directory


class Hub:
    """A stand-in for the hub with one model, downloaded by the client's own rules."""

    def __init__(self, stored: Path, place: Path) -> None:
        self.stored, self.place, self.commit = stored, place, "a" * 40
        self.asked: list[str | None] = []

    def snapshot(self, model, revision=None, allow_patterns=None, ignore_patterns=()):
        self.asked.append(revision)
        folder = self.place / "snapshots" / self.commit
        for file in sorted(path for path in self.stored.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.stored))
            allowed = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(name, p) for p in ignore_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / name)
        return str(folder)

    def metadata(self, api, model, revision):
        self.asked.append(revision)
        files = {
            file.name: read_header(file)
            for file in self.stored.glob("*.safetensors")
            if file.stat().st_size
        }
        return SimpleNamespace(
            files_metadata={name: SimpleNamespace(tensors=found) for name, found in files.items()}
        )


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> Hub:
    stored = tmp_path / "stored"
    shutil.copytree(saved, stored)
    for name in OTHER_FILES:
        (stored / name).parent.mkdir(exist_ok=True)
        (stored / name).write_bytes(b"")
    found = Hub(stored, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "get_safetensors_metadata",
        lambda self, model, revision: found.metadata(self, model, revision),
    )
    return found


def test_a_plan_downloads_no_weights(hub):
    planned = open_source("owner/name", "main", weights=False)
    assert not list(Path(planned.path).glob("*.safetensors"))
    read = open_source("owner/name@main")
    assert planned.tensors == read.tensors and planned.files == read.files
    assert planned.origin == read.origin
    assert (read.origin.name, read.origin.revision, read.origin.commit) == (
        "owner/name", "main", hub.commit,
    )  # fmt: skip


def test_only_what_is_read_is_downloaded_and_all_of_one_commit(hub):
    read = open_source("owner/name@v1")
    names = {str(path.relative_to(read.path)) for path in read.path.rglob("*") if path.is_file()}
    assert names == {path.name for path in hub.stored.iterdir() if path.is_file()} - {*OTHER_FILES}
    assert hub.asked == ["v1", hub.commit]  # asked once what v1 is; the weights are that commit's


def test_a_single_weight_file_needs_no_index(hub):
    for file in [*hub.stored.glob("*.safetensors*")]:
        file.unlink()
    tiny("mixtral").save_pretrained(hub.stored)
    assert open_source("owner/name").files == ["model.safetensors"]


def test_a_model_without_safetensors_is_refused(hub):
    for file in [*hub.stored.glob("*.safetensors*")]:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"owner/name: has neither model\.safetensors nor"):
        open_source("owner/name")


def test_a_type_that_cannot_be_read_is_refused_before_the_download(hub, monkeypatch):
    tensors = {"a": SimpleNamespace(dtype="F4", shape=[2, 4])}
    found = SimpleNamespace(files_metadata={"b.safetensors": SimpleNamespace(tensors=tensors)})
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, model, revision: found
    )
    with pytest.raises(CheckpointError, match=r"owner/name: b\.safetensors: tensor a .* type F4"):
        open_source("owner/name", weights=False)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            errors.GatedRepoError,
            r"owner/nam is gated: ask for access at .*/owner/nam, then",
        ),
        (errors.RepositoryNotFoundError, r"the hub has no model owner/nam; .* set HF_TOKEN$"),
        (errors.RevisionNotFoundError, r"owner/nam has no branch, tag or commit 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, raised, message):
    def refuse(*args, **kwargs):
        raise raised("401 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(HubError, match=message):
        open_source("owner/nam@v2")


def test_any_other_error_is_passed_on_in_one_line(monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("500: out of order\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(HubError, match=r"for owner/nam: OSError: 500: out of order and more$"):
        open_source("owner/nam")


@pytest.mark.parametrize("model", ["./missing", "/nowhere/model", "a/b/c", "a/b/c@main"])
def test_a_path_is_never_looked_up_on_the_hub(model):
    with pytest.raises(UserError, match="no directory"):
        open_source(model)


def test_a_directory_with_an_at_in_its_name_goes_first(saved, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    shutil.copytree(saved, tmp_path / "owner" / "name@v1")
    monkeypatch.chdir(tmp_path)
    assert open_source("owner/name@v1").origin is None
    with pytest.raises(UserError, match="revision: has no effect on a model directory"):
        open_source("owner/name@v1", "v2")


def test_names_and_revisions():
    assert split_revision("owner/name") == ("owner/name", None)
    assert split_revision("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    for wrong in ("owner/name@", "owner/na me", "", "-a/b", "a..b", "a/b/c"):
        with pytest.raises(HubError):
            split_revision(wrong)
    assert is_name("gpt2") and not is_name("a" * 97)
    with pytest.raises(UserError, match="names one already"):
        open_source("owner/name@a", "b")


def test_a_snapshot_in_the_cache_is_used_offline(saved, tmp_path, monkeypatch):
    commit = cache_model(tmp_path, "owner/name", saved, refs=("main", "v1"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for asked in ("owner/name", "owner/name@v1", f"owner/name@{commit}"):
        for weights in (True, False):  # a plan takes the headers from the cache as well
            source = open_source(asked, weights=weights)
            assert source.origin.commit == commit and source.tensors
    with pytest.raises(HubError, match=r"name@v2 is not in the hub's cache .* HF_HUB_OFFLINE"):
        open_source("owner/name@v2")
    with pytest.raises(HubError, match=r"other/name is not in the hub's cache"):
        open_source("other/name")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("models/qwen33", "models/qwen3"),
        ("modles/qwen3", "models/qwen3"),
        ("{root}/models/qwn3", "{root}/models/qwen3"),
        ("models/other", None),  # nothing of that kind
        ("models/text", None),  # no model
        ("owner/name", None),
    ],
)
def test_a_mistyped_path_suggests_the_directory(tmp_path, monkeypatch, asked, found):
    monkeypatch.chdir(tmp_path)
    for name in ("qwen3", "texts"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "qwen3" / "config.json").write_text("{}")
    hint = near_directory(asked.format(root=tmp_path))
    said = f" (did you mean the directory {found.format(root=tmp_path)}?)" if found else ""
    assert hint == said
