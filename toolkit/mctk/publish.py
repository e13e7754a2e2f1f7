"""Uploads results to the Hugging Face hub, with their model cards.

Whatever can fail is asked before a run begins (`prepare`): token, name, permission, whether the
repository holds another model. What is uploaded is a list of what a model directory may have, so
that nothing private goes along: no caches, no log, no metrics.json, which names paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .engine.shards import CARRIED
from .engine.workspace import STATE
from .errors import UserError, brief
from .files import write_text
from .hub import SITE, HubError, is_name
from .report.card import TAG

if TYPE_CHECKING:
    from huggingface_hub import HfApi

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
UPLOADED = [*WEIGHTS, "config.json", "README.md", "report.md", "recipe.yaml", *CARRIED]
_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def prepare(repository: str, private: bool = False, base: str | None = None) -> str:
    """Makes sure that a result can be uploaded, and creates the repository if it does not exist.

    Args:
        repository: owner/name.
        private: Whether only its owner may see it; else as the owner's default says, which is
            public unless an organisation decided otherwise.
        base: The name on the hub of the model that is compressed.

    Returns:
        The repository's address.

    Raises:
        HubError: No token, no permission, a wrong name, or a repository that holds another model.
    """
    from huggingface_hub import HfApi, constants

    if not is_name(repository) or "/" not in repository:
        raise HubError(f"push to hub: {repository!r} is no name of a repository: write OWNER/NAME")
    if repository == base:
        raise HubError(f"push to hub: {repository} is the original; give the result another name")
    if constants.HF_HUB_OFFLINE:
        raise HubError("push to hub: HF_HUB_OFFLINE is set; unset it")
    api = HfApi()
    user = _asked(api.whoami, repository, "log in with `hf auth login`, or set HF_TOKEN")["name"]
    rights = f"does the token of {user} have write access to {repository.partition('/')[0]}?"
    _asked(api.create_repo, repository, rights, repository, exist_ok=True, private=private or None)
    _asked(api.auth_check, repository, rights, repository, write=True)
    _refuse_other(api, repository, private)
    return f"{SITE}/{repository}"


def _asked(
    call: Callable[..., Any], repository: str, remedy: str, *args: Any, **options: Any
) -> Any:
    """What the hub answers.

    Raises:
        HubError: It refuses, or is not there.
    """
    try:
        return call(*args, **options)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise HubError(
            f"push to hub: {repository}: {type(error).__name__}: {brief(error)}; {remedy}"
        ) from error


def _refuse_other(api: HfApi, repository: str, private: bool) -> None:
    found = _asked(api.model_info, repository, "try again", repository)
    files = [file.rfilename for file in found.siblings or ()]
    if any(file.endswith(_MODEL_FILES) for file in files) and TAG not in (found.tags or ()):
        raise HubError(
            f"push to hub: {repository} holds a model that mctk did not make; choose another name"
        )
    if private and not found.private:
        raise HubError(
            f"push to hub: {repository} is there already, and public; make it private in its "
            f"settings ({SITE}/{repository}/settings), or leave out --private"
        )


def push(directory: Path, repository: str) -> str:
    """Uploads a finished result in one commit; weight files of an earlier one go with it.

    Its model card then loads the model by the repository's name.

    Args:
        directory: What `mctk run`, `mctk compare` (in rows/) or `mctk export` has written.
        repository: owner/name; it exists (`prepare`).

    Returns:
        The repository's address.

    Raises:
        UserError: It is no finished result whose files were checked.
        HubError: The upload failed.
    """
    check_result(directory)
    from huggingface_hub import HfApi

    card = directory / "README.md"
    text = card.read_text(encoding="utf-8")
    write_text(card, re.sub(r'^path = ".*', f'path = "{repository}"', text, flags=re.MULTILINE))
    _asked(
        HfApi().upload_folder,
        repository,
        "the same command tries again, and uploads only what is missing",
        repo_id=repository,
        folder_path=str(directory),
        allow_patterns=UPLOADED,
        ignore_patterns=[".*"],
        delete_patterns=WEIGHTS,
        commit_message="Compressed by mctk",
    )
    return f"{SITE}/{repository}"


def check_result(directory: Path) -> str | None:
    """Looks whether a directory is something to upload.

    Returns:
        The name on the hub of the model that it was made from, as far as it is known.

    Raises:
        UserError: It is no result of mctk, is not finished, or its files were not checked.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no config.json; is it a model directory?")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: holds no weights any more; make it again first")
    manifest, metrics = (
        _read(directory / name) for name in (f"{STATE}/manifest.json", "metrics.json")
    )
    if manifest is not None and not (manifest.get("finished") and metrics):
        raise UserError(f"{directory}: the run is not finished; give its command again first")
    if metrics is not None and (metrics.get("gate") or {}).get("streamed_equal") is not True:
        raise UserError(
            f"{directory}: its files were not checked (gate: false); what was not is not uploaded"
        )
    if TAG not in _tags(directory / "README.md"):
        raise UserError(
            f"{directory}: is no result of mctk: its README.md has not the tag {TAG}; "
            "`hf upload` takes any directory"
        )
    base: str | None = ((metrics or {}).get("model") or {}).get("hub")
    return base


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return found


def _tags(card: Path) -> list[str]:
    """The tags that a model card's front matter has."""
    parts = card.read_text(encoding="utf-8").split("---\n", 2) if card.is_file() else []
    if len(parts) < 3:
        return []
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise UserError(f"{card}: its front matter is no YAML: {brief(error)}") from error
    tags = front.get("tags") if isinstance(front, dict) else None
    return [str(tag) for tag in tags] if isinstance(tags, list) else []
