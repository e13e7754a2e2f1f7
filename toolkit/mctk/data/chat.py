"""Conversations: read from rows, and written out as the tokenizer's chat template says."""

from __future__ import annotations

from typing import Any

from mctk.data.sources import Source, TextError
from mctk.errors import brief

ANSWERS = ("response", "completion")


def check_template(tokenizer: Any, source: Source) -> None:
    """Refuses a chat source where the tokenizer cannot write conversations out.

    Raises:
        TextError: It has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the model's tokenizer has no chat template; leave chat out, or give the model's "
            "directory a chat_template.jinja",
            source,
            "chat",
        )


def conversation(row: Any, source: Source, place: str) -> list[dict[str, Any]]:
    """Reads a row's messages.

    Args:
        row: An object with `messages` (or the source's column), or with `prompt` and `response` or
            `completion`: each a text, or a list of messages.
        source: For errors and the column.
        place: File or dataset and row.

    Raises:
        TextError: The row holds no conversation.
    """
    row = row if isinstance(row, dict) else {}
    column = source.column or "messages"
    answer = next((key for key in ANSWERS if row.get(key) is not None), None)
    if row.get(column) is not None:
        found = _messages(row[column], "")
    elif source.column is None and row.get("prompt") is not None and answer is not None:
        prompt, reply = _messages(row["prompt"], "user"), _messages(row[answer], "assistant")
        found = prompt + reply if prompt and reply else None
    else:
        found = None
    if not found:
        problem = f'{place}: not an object with "{column}", a list of {{role: ..., content: ...}}'
        if source.column is None:
            problem += ', or with "prompt" and "response"'
        raise TextError(problem, source, source.key)
    return found


def _messages(value: Any, role: str) -> list[dict[str, Any]] | None:
    """A list of messages, or a text as the one message of a role; None if it is neither."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        return None
    found = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        # Tables fill in what only some messages have; to a template that would be a value.
        message = {key: part for key, part in message.items() if part is not None}
        if not isinstance(message.get("content", ""), str) or len(message) < 2:
            return None
        found.append(message)
    return found


def written_out(tokenizer: Any, messages: list[dict[str, Any]], source: Source, place: str) -> str:
    """A conversation as text, with the special tokens that the template puts.

    Raises:
        TextError: The template refuses it, e.g. roles that do not take turns.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template raises what it likes
        raise TextError(
            f"{place}: the tokenizer's chat template refuses it: {brief(error)}",
            source,
            source.key,
        ) from error
