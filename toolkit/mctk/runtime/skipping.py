"""Dynamic expert skipping at run time: which of a token's chosen experts are not computed.

The policy is a term of the experts' down bank (`mctk.terms.ExpertSkip`), which decides by a token's
own routing weights and by nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import CheckpointError
from ..terms import ExpertSkip, Term


def skip_policy(terms: Mapping[str, Sequence[Term]]) -> ExpertSkip | None:
    """Returns a module's policy, None without one.

    Args:
        terms: "gate" (if there is one), "up", "down" → the terms.

    Raises:
        CheckpointError: There are several, or one stands elsewhere than in down.
    """
    found = [
        (f"terms.{part}[{i}]", part, term)
        for part, bank in terms.items()
        for i, term in enumerate(bank)
        if isinstance(term, ExpertSkip)
    ]
    for number, (where, part, _) in enumerate(found):
        if part != "down":
            raise CheckpointError(f"{where}: a skip term stands in down, not in {part}")
        if number:
            raise CheckpointError(f"{where}: a second skip term")
    return found[0][2] if found else None


def without_policy(terms: Iterable[Term]) -> list[Term]:
    """Returns the terms that compute something."""
    return [term for term in terms if not isinstance(term, ExpertSkip)]
