"""What is measured on a model, original or compressed: parts of a comparison's result.

Divergences are nats a token. A figure that was not taken, or is not finite, is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FEW = 8  # windows of a text below which the bootstrap's interval is too narrow to be trusted
DOUBT = "!"  # what stands behind such an interval


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its 95 % interval (percentile bootstrap over windows)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Divergence:
    """How far next-token distributions are from the original's on one held-out text.

    Attributes:
        kl: Mean over positions of KL(original ‖ row), nats a token.
        agreement: Share of positions where both give the same most likely token.
        tokens: Positions that were compared.
        protocol: Name, version and settings of the measurement.
    """

    kl: Interval | None
    agreement: Interval
    tokens: int
    protocol: str


@dataclass(frozen=True)
class TextScore:
    """Perplexity on one held-out text, and what else was measured there.

    Attributes:
        perplexity: exp of the mean negative log-likelihood; None if not finite.
        nll: That mean, nats a token.
        tokens: Predicted tokens.
        windows: Windows.
        protocol: Name, version and settings of the measurement.
        digest: SHA-256 of the token ids: figures of equal protocol and digest can be compared.
        change: Log-perplexity less the original's on the same windows, by a paired bootstrap;
            positive is worse; None for the original.
        divergence: From the original; None where it was not asked for.
        window_nll: Each window's summed negative log-likelihood, nats: two rows are told apart by
            their differences on the same windows.
    """

    perplexity: float | None
    nll: float | None
    tokens: int
    windows: int
    protocol: str
    digest: str
    change: Interval | None = None
    divergence: Divergence | None = None
    window_nll: list[float | None] = field(default_factory=list)


def few_windows(texts: Mapping[str, TextScore]) -> int | None:
    """The fewest windows of any text, where they are too few for an interval; else None.

    Two windows give their own two figures as bounds; with N the percentile interval is too narrow
    by about sqrt((N - 1) / N), and skewed windows are not seen.
    """
    least = min((text.windows for text in texts.values()), default=FEW)
    return least if least < FEW else None


def compared_windows(text: TextScore) -> int | None:
    """How many windows of a text its divergence was taken on; None without one."""
    if text.divergence is None or not text.tokens:
        return None
    return round(text.divergence.tokens * text.windows / text.tokens)


@dataclass(frozen=True)
class Overall:
    """All texts together: what figures plot and rows are ranked by.

    Attributes:
        perplexity: exp of the mean over texts of their mean negative log-likelihoods: the geometric
            mean of the texts' perplexities; None if one is not finite.
        change: Log-perplexity less the original's, by a paired bootstrap over all texts' windows,
            each text drawn by itself; None for the original.
        divergence: Over all compared positions of all texts.
    """

    perplexity: float | None
    change: Interval | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class TaskScore:
    """One lm-eval task.

    Attributes:
        metric: Which of the task's figures: acc_norm where there is one, else acc, else its first.
        value: The figure.
        stderr: Its standard error.
        chance: What guessing gives; None where the task is no choice among answers.
        constant: Whether every answer was the same choice.
        documents: How many were asked.
        version: Of the task.
        shots: Examples in the prompt.
    """

    metric: str
    value: float
    stderr: float | None
    chance: float | None
    constant: bool | None
    documents: int | None
    version: Any = None
    shots: int | None = None


@dataclass(frozen=True)
class Average:
    """The mean over tasks, all of the comparison's, and what guessing gives on average."""

    value: float
    chance: float | None
    tasks: list[str]


@dataclass(frozen=True)
class Speed:
    """Tokens per second; noisy, since whatever else the machine does counts.

    Attributes:
        prefill: Tokens per second of a forward pass over whole sequences: median, least, most.
        decode: Tokens per second, one new token a sequence at a time: median, least, most.
        protocol: Name, version and settings of the measurement.
    """

    prefill: Interval
    decode: Interval | None
    protocol: str
