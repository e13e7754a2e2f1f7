"""The registry of term kinds. Kinds are open: a plugin may add its own.

A checkpoint that holds a plugin's kind names the plugin and is refused without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from mctk.errors import CheckpointError, nearest

if TYPE_CHECKING:
    from mctk.terms.term import Term

OURS = "mctk"

_kinds: dict[str, tuple[type[Term], str]] = {}
_T = TypeVar("_T", bound="type[Term]")


def register_kind(cls: _T, provider: str = OURS) -> _T:
    """Makes a kind of term known under ``cls.kind``; registering it again changes nothing.

    Args:
        cls: A concrete subclass of `Term`.
        provider: The distribution to install for it (what ``pip install`` takes).

    Returns:
        The class.
    """
    known = _kinds.get(cls.kind)
    if known is not None and known[0] is not cls:
        raise ValueError(f"term kind '{cls.kind}' of {provider} is already provided by {known[1]}")
    _kinds[cls.kind] = (cls, provider)
    return cls


def kind(name: str, provider: str | None = None) -> type[Term]:
    """Returns the class of a kind.

    Args:
        name: The kind, as in a spec.
        provider: Who provides it according to the checkpoint, for the error message.

    Raises:
        CheckpointError: The kind is unknown; the message says what to install.
    """
    known = _kinds.get(name)
    if known is not None:
        return known[0]
    if provider is not None and provider != OURS:
        raise CheckpointError(
            f"term kind '{name}' comes from the plugin '{provider}', which is not installed: "
            f"pip install {provider}"
        )
    raise CheckpointError(f"unknown term kind '{name}'{nearest(name, _kinds)}")


def kinds() -> dict[str, str]:
    """Returns the known kinds and who provides each."""
    return {name: provider for name, (_, provider) in _kinds.items()}


def provider_of(name: str) -> str:
    """Returns the provider of a kind; a kind that was never registered counts as ours."""
    known = _kinds.get(name)
    return OURS if known is None else known[1]
