"""Token-level perplexity by the protocol of the compression papers, and its paired comparison.

The concatenated text is cut into contiguous windows of `length` tokens that do not overlap; the
first token of each window is not predicted; what is left at the end is dropped. The figure depends
on the tokenizer and the window: compare it only at an equal protocol and an equal digest of the
token ids (lm-eval's word-level perplexity is another number).
Letters: N windows, B windows of a batch, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .bootstrap import SAMPLES, bootstrap_mean

if TYPE_CHECKING:
    import torch
    from numpy.typing import ArrayLike

PROTOCOL = "token_ppl"
VERSION = 1  # raised whenever the figures change
_CHUNK = 1 << 24  # float32 logits that are looked at together: 64 MiB

Progress = Callable[[int, int], None]
"""Is called with (done, in all)."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one model on one text.

    Attributes:
        length: T, tokens of a window, of which T - 1 are predicted.
        window_nll: Negative log-likelihood in nats, summed over each window's predictions, [N].
        digest: SHA-256 of the token ids and their shape.
    """

    length: int
    window_nll: tuple[float, ...]
    digest: str

    @property
    def protocol(self) -> str:
        """Name, version and parameters of what was measured."""
        return f"{PROTOCOL}/v{VERSION} window={self.length} stride={self.length}"

    @property
    def windows(self) -> int:
        """N."""
        return len(self.window_nll)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens, N (T - 1)."""
        return self.windows * (self.length - 1)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a predicted token, in nats."""
        return math.fsum(self.window_nll) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that is beyond a double, NaN if the model gave NaN."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    def to_json(self) -> dict[str, Any]:
        """Returns what metrics.json keeps; figures that are not finite become null."""
        return {
            "protocol": self.protocol,
            "windows": self.windows,
            "tokens": self.tokens,
            "nll": _finite(self.nll),
            "perplexity": _finite(self.perplexity),
            "window_nll": [_finite(value) for value in self.window_nll],
            "digest": self.digest,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def ids_digest(ids: torch.Tensor) -> str:
    """SHA-256 of the windows' shape and token ids, as `mctk.data.TokenWindows` has it."""
    shape = f"{tuple(ids.shape)}\0".encode()
    return hashlib.sha256(shape + ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def window_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns each window's summed negative log-likelihood.

    The log-softmax is taken in float32, some rows at a time, so that memory stays bounded whatever
    B, T and V are; the sums are float64.

    Args:
        logits: [B, T, V], of any floating type.
        ids: [B, T], the tokens that the logits came from.

    Returns:
        float64 [B], on the logits' device.
    """
    import torch

    batch, length, vocabulary = logits.shape
    ids = ids.to(logits.device)
    rows = max(1, _CHUNK // vocabulary)
    sums = torch.zeros(batch, dtype=torch.float64, device=logits.device)
    for window in range(batch):
        for first in range(0, length - 1, rows):
            last = min(first + rows, length - 1)
            part = logits[window, first:last].float()  # [rows, V]
            target = ids[window, first + 1 : last + 1, None]  # the next token
            loss = torch.logsumexp(part, dim=-1) - part.gather(1, target)[:, 0]
            sums[window] += loss.double().sum()
    return sums


def score(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, list[float]]:
    """Scores logits as they come.

    Args:
        batches: Pairs of ids [B, T] and logits [B, T, V] in the order of the text; all of one T.

    Returns:
        All ids [N, T] and each window's summed negative log-likelihood.

    Raises:
        UserError: There is no window, or a window of a single token, which predicts nothing.
    """
    import torch

    seen: list[torch.Tensor] = []
    sums: list[float] = []
    for ids, logits in batches:
        seen.append(ids.cpu())
        sums.extend(window_nll(logits, ids).tolist())
    if not seen:
        raise UserError("perplexity: the text holds not one whole window; give a shorter length")
    ids = torch.cat(seen)
    if ids.shape[1] < 2:
        raise UserError("perplexity: a window needs at least 2 tokens (length: 2)")
    return ids, sums


def perplexity(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Perplexity:
    """Perplexity of the windows that `batches` brings; arguments and errors as `score`."""
    ids, sums = score(batches)
    return Perplexity(ids.shape[1], tuple(sums), ids_digest(ids))


def forward_logits(
    model: Any, ids: torch.Tensor, batch_size: int, progress: Progress | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Runs a model that is whole in memory.

    Args:
        model: What `from_pretrained` returns; left in evaluation mode.
        ids: [N, T].
        batch_size: B.
        progress: Is called with (windows done, N) once a batch has been scored.

    Yields:
        ids [B, T] and logits [B, T, V].

    Raises:
        UserError: The accelerator's memory does not hold a batch.
    """
    import torch

    model.eval()
    done = 0
    for batch in ids.split(batch_size):
        try:
            with torch.inference_mode():
                logits = model(input_ids=batch.to(model.device), use_cache=False).logits
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory at batch size {batch_size} and length {ids.shape[1]}; "
                "give a smaller batch size, or stream the model layer by layer (--streamed)"
            ) from error
        yield batch, logits
        done += len(batch)
        if progress is not None:
            progress(done, len(ids))


def streamed_logits(
    model: Any, ids: torch.Tensor, batch_size: int, progress: Progress | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Runs a `mctk.sweep.StreamedModel`, of which one decoder layer is in memory at a time.

    Takes and yields what `forward_logits` does; `progress` is told of layers instead of windows.
    """
    from ..sweep import stream_logits

    batches = stream_logits(model, ids, batch_size, progress)
    yield from zip(ids.split(batch_size), batches, strict=True)


def paired_bootstrap(
    nll_a: ArrayLike,
    nll_b: ArrayLike,
    tokens: ArrayLike,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Compares two models on the same windows: log-perplexity of `b` less that of `a`.

    Windows are drawn with replacement, the same for both models: most of what makes one window
    harder than another cancels, so the interval is far narrower than that of either perplexity.

    Args:
        nll_a: Summed negative log-likelihood of each window under the baseline, [N].
        nll_b: The same under the other model, [N].
        tokens: Predicted tokens of each window: one number, or [N].
        samples: Number of resamples.
        seed: Seed of the draw.

    Returns:
        The difference (positive: `b` is worse) and the bounds of its 95 % percentile interval.

    Raises:
        ValueError: The windows do not correspond.
    """
    a, b = np.asarray(nll_a, dtype=np.float64), np.asarray(nll_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"paired bootstrap: {a.shape} and {b.shape} windows do not correspond")
    return bootstrap_mean([(b - a, tokens)], samples, seed)
