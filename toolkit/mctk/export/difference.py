"""How far an export is from what it was made of: both are streamed on a few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Source
from ..runtime import dynamic_pruning
from ..sweep import StreamedModel, stream_logits

SEQUENCES, LENGTH = 2, 48  # tokens that are compared
FLOOR = 1e-4  # what sums in float32 may differ by, whatever the files' dtype


@dataclass(frozen=True)
class Difference:
    """Logits of an export against those of the compressed model, both computed in float32.

    A token's difference is the norm of the difference of its logits over the norm of the logits
    themselves, less their mean.

    Attributes:
        tokens: How many were compared.
        median: The difference of the median token. A rounding error may change which experts a
            token is routed to, so single tokens may be far off where most are not.
        largest: Of the worst token.
        same_choice: Share of the tokens for which both find the same next token most likely.
        allowed: What rounding the matrices to the dtype of the files may cost the median token.
        skipping: The median difference from the compressed model as it runs, if it skips channels
            or experts at run time; what stands above is without skipping. None if it skips nothing.
    """

    tokens: int
    median: float
    largest: float
    same_choice: float
    allowed: float
    skipping: float | None = None

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding explains."""
        return self.median <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


def allowed(dtype: torch.dtype, layers: int) -> float:
    """What rounding all matrices once may change the logits by.

    Each matrix gets an error of at most half a unit in the last place of every entry, u; errors of
    layers are independent and add up as squares. Four times u √L is far above what is measured
    (about u) and far below what a matrix in a wrong place does (about 1).
    """
    return max(FLOOR, 4 * torch.finfo(dtype).eps / 2 * math.sqrt(layers))


def random_ids(config: Mapping[str, Any], vocabulary: int) -> torch.Tensor:
    """Token ids [B, T], the same in every call.

    Args:
        config: The model's configuration. Tokens that it names stand for the ends of a text, or for
            an image that is not there, and are left out.
        vocabulary: How many tokens there are.
    """
    special = set(_token_ids(config))
    plain = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(0)
    return plain[torch.randint(len(plain), (SEQUENCES, LENGTH), generator=generator)]


def _token_ids(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif str(key).endswith(("token_id", "token_index")):
            yield from (v for v in (value if isinstance(value, list) else [value]) if v is not None)


def measure(
    compressed: StreamedModel,
    exported: Path,
    dtype: torch.dtype,
    skips: bool,
    trust_remote_code: bool,
    progress: Callable[[str, int, int], None],
) -> Difference:
    """Compares the written files with the compressed model.

    Args:
        compressed: The compressed model, streamed in float32.
        exported: The directory that was written.
        dtype: The narrowest dtype of the matrices that were multiplied out.
        skips: Whether the compressed model skips anything at run time.
        trust_remote_code: Whether code that the directory carries may run.
        progress: Is called with (what, layers done, layers).
    """
    layers = len(compressed.layers)
    ids = random_ids(compressed.config.to_dict(), compressed.config.get_text_config().vocab_size)
    written = StreamedModel(Source(exported), str(compressed.device), "float32", trust_remote_code)

    def logits(model: StreamedModel, what: str) -> torch.Tensor:
        batches = stream_logits(
            model, ids, SEQUENCES, lambda done, total: progress(what, done, total)
        )
        return torch.cat([batch.double().cpu() for batch in batches]).flatten(0, 1)

    running = logits(compressed, "compressed model, as it runs") if skips else None
    with dynamic_pruning(compressed.model, False):
        before = logits(compressed, "compressed model")
    after = logits(written, "exported model")
    each = _relative(after, before)
    return Difference(
        tokens=len(each),
        median=float(each.median()),
        largest=float(each.max()),
        same_choice=float((after.argmax(-1) == before.argmax(-1)).double().mean()),
        allowed=allowed(dtype, layers),
        skipping=None if running is None else float(_relative(after, running).median()),
    )


def _relative(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Each token's relative difference, [T]."""
    spread = reference - reference.mean(-1, keepdim=True)
    return (logits - reference).norm(dim=-1) / spread.norm(dim=-1)
