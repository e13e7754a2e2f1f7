"""Finds a model: a directory as it is, a name by way of the hub and its local cache."""

from __future__ import annotations

from pathlib import Path

from ..dtypes import DTYPE_BYTES
from ..errors import CheckpointError, UserError, brief
from .source import Source, TensorInfo

TEXTS = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md"]
WEIGHTS = ["*.safetensors"]


def open_source(model: str, revision: str | None = None, weights: bool = True) -> Source:
    """Opens a model.

    Args:
        model: A directory, or a name on the hub.
        revision: Branch, tag or commit of a hub model.
        weights: Whether its weights will be read. If not, a hub model's weights are not
            downloaded: their headers are enough, a few hundred kilobytes.

    Raises:
        UserError: Neither a directory nor a model that the hub (or its cache) has.
        CheckpointError: It is damaged, or holds no safetensors.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"model: no directory {model}")
    from huggingface_hub import snapshot_download

    try:
        if weights:
            return Source(
                snapshot_download(model, revision=revision, allow_patterns=TEXTS + WEIGHTS)
            )
        folder = snapshot_download(model, revision=revision, allow_patterns=TEXTS)
        return Source(folder, _headers(model, revision))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise UserError(
            f"model: {model} is no directory here, and the hub gave: "
            f"{type(error).__name__}: {brief(error)}"
        ) from error


def _headers(model: str, revision: str | None) -> dict[str, dict[str, TensorInfo]]:
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
