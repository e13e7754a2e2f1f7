"""Other values of a method's options: what a test turns to see that each changes something."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

from ..errors import UserError, brief, nearest
from ..hookspecs import MethodOptions


def variants(
    kind: type[MethodOptions],
    base: Mapping[str, Any],
    given: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, list[MethodOptions]]:
    """Options that differ from a base in one option each.

    Args:
        kind: The method's options.
        base: Values to start from.
        given: By option, values to try: for those whose type does not say any, such as lists.

    Returns:
        By option, checked options; an empty list where no other value could be made up.

    Raises:
        UserError: A given value is not valid, or there is no such option.
    """
    for name in given or {}:
        if name not in kind.model_fields:
            raise UserError(f"no option '{name}'{nearest(name, kind.model_fields)}")
    start = _made(kind, base)
    found: dict[str, list[MethodOptions]] = {}
    for name, field in kind.model_fields.items():
        value = getattr(start, name)
        if given and name in given:
            made = [_made(kind, {**base, name: other}) for other in given[name]]
        else:
            made = [*_valid(kind, base, name, _others(field.annotation, value))]
        found[name] = [options for options in made if getattr(options, name) != value]
    return found


def _made(kind: type[MethodOptions], values: Mapping[str, Any]) -> MethodOptions:
    try:
        return kind(**values)
    except ValidationError as error:
        raise UserError(f"{kind.__name__}: {brief(error)}") from error


def _valid(
    kind: type[MethodOptions], base: Mapping[str, Any], name: str, others: Iterator[Any]
) -> Iterator[MethodOptions]:
    """Options with other values of one, without those out of bounds or not to be had together."""
    for other in others:
        with contextlib.suppress(ValidationError):
            yield kind(**{**base, name: other})


def _others(annotation: Any, value: Any) -> Iterator[Any]:
    """Values that an option of this type may have besides its own."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from [None] if part is NoneType else _others(part, value)
    elif origin is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield not value
    elif annotation is int:
        count = value if isinstance(value, int) else 2
        yield from (count * 2, max(count // 2, 1), count + 1, count - 1, 1, 2, 4, 8)
    elif annotation is float:
        number = value if isinstance(value, float) else 0.5
        yield from (number / 2, number * 2, 0.5, 0.25, 0.9, 0.1, 1.0, 0.0)
