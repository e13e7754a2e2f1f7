"""Finds a model: a directory as it is, a name by way of the hub and its local cache."""

from __future__ import annotations

from pathlib import Path

from ..dtypes import DTYPE_BYTES
from ..errors import CheckpointError, UserError
from ..hub import HubError, explain, looks_local, near_directory, split_revision
from .source import INDEX, SINGLE, Origin, Source, TensorInfo, read_index

TEXTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md"]
# A pattern's * also matches slashes. What lies in such directories is the same model for others.
OTHERS = ["original/*", "onnx/*", "openvino/*", "gguf/*", "coreml/*", "metal/*", "mlx/*", ".*"]


def open_source(model: str | Path, revision: str | None = None, weights: bool = True) -> Source:
    """Opens a model.

    A hub model's branch or tag is resolved to its commit once, and all of its files are that
    commit's. Of these only those that are read are downloaded: config, tokenizer, code, card, and
    the weight files that the index names.

    Args:
        model: A directory, or a name on the hub, also as `owner/name@revision`; a directory that
            is called so goes first.
        revision: Branch, tag or commit of a hub model.
        weights: Whether its weights will be read. If not, a hub model's weights are not
            downloaded: their headers are enough, a few hundred kilobytes.

    Raises:
        HubError: Neither a directory nor a model that the hub (or its cache) has.
        CheckpointError: It is damaged, or holds no safetensors.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision: has no effect on a model directory ({path})")
        return Source(path)
    if path.is_file():
        raise UserError(f"model: {model} is a file; give the model's directory, or a hub name")
    if looks_local(str(model)):
        raise UserError(f"model: no directory {model}{near_directory(str(model))}")
    name, written = split_revision(str(model))
    if written is not None and revision is not None:
        raise UserError(f"revision: {model} names one already; give one of them")
    revision = revision or written
    try:
        return _open(name, revision, weights)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated types
        said = explain(error, name, revision)
        near = near_directory(name)
        if "/" not in name:  # more likely a directory than a hub model without an owner
            raise HubError(f"model: no directory {model} here{near}, and {said}") from error
        raise HubError(f"model: {said}{near}") from error


def _open(name: str, revision: str | None, weights: bool) -> Source:
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(name, revision=revision, allow_patterns=TEXTS, ignore_patterns=OTHERS)
    )
    commit = folder.name  # snapshots/<commit>, whatever branch or tag was asked for
    origin = Origin(name, revision, commit)
    files = _named_files(folder)
    if all((folder / file).is_file() for file in files):
        return Source(folder, origin=origin)
    if not weights:
        return Source(folder, _headers(name, commit), origin=origin)
    snapshot_download(name, revision=commit, allow_patterns=[*files, SINGLE])
    if not any((folder / file).is_file() for file in files):
        raise CheckpointError(
            f"{name}: has neither {SINGLE} nor {INDEX}; weights in other formats are not read"
        )
    return Source(folder, origin=origin)


def _named_files(folder: Path) -> list[str]:
    """The weight files that a snapshot has or should have; a single one goes first, as always."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return sorted(set(read_index(folder).values()))
    return [SINGLE]


def _headers(model: str, revision: str) -> dict[str, dict[str, TensorInfo]]:
    """The headers of a hub model's weight files, fetched by ranges.

    Raises:
        CheckpointError: A tensor is of a type that cannot be read.
    """
    from huggingface_hub import HfApi

    metadata = HfApi().get_safetensors_metadata(model, revision=revision)
    for file, found in metadata.files_metadata.items():
        for name, info in found.tensors.items():
            if info.dtype not in DTYPE_BYTES:
                raise CheckpointError(
                    f"{model}: {file}: tensor {name} has unknown type {info.dtype}"
                )
    return {
        file: {
            name: TensorInfo(name, file, info.dtype, tuple(info.shape))
            for name, info in found.tensors.items()
        }
        for file, found in metadata.files_metadata.items()
    }
