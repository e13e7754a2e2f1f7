"""Names on the Hugging Face hub, and what its client's errors mean to a user.

HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are the client's own; nothing here reads them.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from .errors import UserError, brief

SITE = "https://huggingface.co"
_NAME = re.compile(r"[A-Za-z0-9_](?:[\w.-]*\w)?(?:/[A-Za-z0-9_](?:[\w.-]*\w)?)?", re.ASCII)


class HubError(UserError):
    """The hub, or its cache on this machine, has not what was asked for."""


def split_revision(text: str) -> tuple[str, str | None]:
    """Splits `owner/name@revision`; a branch, tag or commit, which may contain slashes.

    Raises:
        HubError: The name cannot be one on the hub, or nothing follows the @.
    """
    name, at, revision = text.partition("@")
    if not is_name(name):
        raise HubError(f"{text!r} is no directory here and no name on the hub, such as owner/name")
    if at and not revision.strip():
        raise HubError(f"{text!r}: a branch, tag or commit must follow the @")
    return name, revision or None


def is_name(text: str) -> bool:
    """Whether the hub could have something of this name."""
    return len(text) <= 96 and "--" not in text and ".." not in text and bool(_NAME.fullmatch(text))


def looks_local(text: str) -> bool:
    """Whether a text that is no existing path was meant as one, and not as a name on the hub."""
    return text.startswith((".", "/", "~")) or text.partition("@")[0].count("/") > 1


def near_directory(text: str) -> str:
    """The hint that follows a model that is not there: a model directory of nearly that path.

    Empty where there is none.
    """
    asked = Path(text).expanduser()
    found = Path(asked.anchor)
    for part in asked.parts[bool(asked.anchor) :]:
        name = part
        if not (found / part).is_dir():
            try:
                names = [path.name for path in found.iterdir() if path.is_dir()]
            except OSError:
                return ""
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.6)
            if not close:
                return ""
            name = close[0]
        found /= name
    if found == asked or not (found / "config.json").is_file():
        return ""
    return f" (did you mean the directory {found}?)"


def explain(error: Exception, name: str, revision: str | None = None) -> str:
    """Says what an error of the hub's client means, and what to do.

    Args:
        error: What `huggingface_hub` raised.
        name: The model that was asked for.
        revision: Its branch, tag or commit.
    """
    from huggingface_hub import errors

    at = f"{name}@{revision}" if revision else name
    page = f"{SITE}/{name}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: ask for access at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no model {name}; check the name. If it is private, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision!r}; {page}/tree/main lists them"
    if isinstance(error, errors.EntryNotFoundError) and _offline(error):
        return (
            f"{at} is not in the hub's cache on this machine, or not all of it, and HF_HUB_OFFLINE "
            "forbids to download it; unset that once, or set HF_HOME to where it is"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{at} is not in the hub's cache on this machine, and the hub cannot be reached"
    return f"the hub gave for {at}: {type(error).__name__}: {brief(error)}"


def _offline(error: BaseException) -> bool:
    """Whether a lack in the cache was found because the network is forbidden."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or "OfflineMode" in type(error.__cause__).__name__
