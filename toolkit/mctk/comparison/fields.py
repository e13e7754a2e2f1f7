"""The columns of a comparison: what each is, where it comes from and how it is written."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ..report.tables import NONE, Format, count, duration, fixed, percent, scientific, size
from .result import Comparison, Original, Row
from .scores import DOUBT, few_windows
from .standing import Entry, Subject, change, score

Value = Callable[[Subject], float | None]
NOISY = ("task", "average", "retained")  # too noisy for the best of them to mean much

HELP = {
    "kept": "weight elements stored of what the budgets are of, as a share of the original's; of "
    "the experts alone, without their router's rows, where budgets are of the experts",
    "bytes_share": "payload of all tensors, as a share of the original's",
    "parameters": "stored weight elements, tied ones once",
    "parameters_share": "stored weight elements, as a share of the original's",
    "active_parameters": "weight elements that one token passes through",
    "flops_per_token": "two for each multiply-add of the weight matrices",
    "bytes": "payload of all tensors: positions, scales and packed bits as they are stored",
    "expert_bytes_share": "payload of the routed experts, as a share of the original's",
    "perplexity": "token perplexity by the protocol below",
    "change": "mean over texts of the change of log-perplexity against the original, with its 95 % "
    "interval from a paired bootstrap over windows",
    "overall": "geometric mean of the texts' perplexities",
    "kl": "KL(original ‖ row) of next-token distributions, mean over the positions of all texts, "
    "nats a token",
    "agreement": "share of positions where both find the same token most likely",
    "task": "accuracy of an lm-eval task ± its standard error",
    "average": "mean over tasks ± its standard error",
    "retained": "(mean over tasks − chance) / (the original's − chance): 100 % is the original's "
    "skill, 0 % guessing",
    "layer_error": "relative squared error of a layer's output as stored, mean over all layers; a "
    "layer that was left alone counts with 0",
    "prefill": "tokens per second of a forward pass over whole sequences",
    "decode": "tokens per second, one new token a sequence at a time",
    "peak_memory": "largest resident set of the process that evaluated the row",
    "seconds": "seconds of the row's own work, without the calibration that all rows share",
}


@dataclass(frozen=True)
class Field:
    """One column.

    Attributes:
        key: Its name in CSV.
        title: Its heading.
        help: What it is, in a sentence.
        value: Its figure for a row or the original; None where there is none.
        format: Writes the figure.
        better: Whether low or high figures are better; None where neither.
        part: "quality" or "cost": the table that it stands in where there are two.
        rank: Place in the queue for a narrow terminal; from 20 on it is left to other outputs.
        error: The figure's own standard error, shown where there are no seeds to take it from.
        chance: What guessing gives.
    """

    key: str
    title: str
    help: str
    value: Value
    format: Format
    better: Literal["low", "high"] | None
    part: Literal["quality", "cost"]
    rank: int
    error: Value | None = None
    chance: float | None = None

    @property
    def heading(self) -> str:
        """The title with an arrow that says which way is better."""
        return self.title + {"low": "\u00a0↓", "high": "\u00a0↑", None: ""}[self.better]

    def shown(self, entry: Entry) -> str:
        """The figure over all seeds of an entry: the mean, and the spread where there is one."""
        mean, spread = entry.mean(self.value), entry.spread(self.value)
        if spread is None and self.error is not None:
            spread = entry.mean(self.error)
        if mean is None:
            return NONE
        # A spread that would be written as nothing is left out.
        written = spread is not None and self.format(spread) != self.format(0.0)
        return self.format(mean) + (f" ± {self.format(spread)}" if written else "")

    def of_original(self, original: Original) -> str:
        """The figure of the original."""
        value, spread = self.value(original), self.error(original) if self.error else None
        return self.format(value) + (f" ± {self.format(spread)}" if spread is not None else "")


def perplexity(value: float | None) -> str:
    """A perplexity in four figures or so: 12.85, 153.2, 8041, 1.2e+06."""
    if value is None or not math.isfinite(value):
        return NONE
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:.{2 if value < 100 else 1 if value < 1000 else 0}f}"


def rate(value: float | None) -> str:
    """Tokens per second in three figures."""
    if value is None:
        return NONE
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def fields_of(comparison: Comparison) -> list[Field]:
    """The columns that at least one row has a figure in, in order."""
    original = comparison.original
    candidates = [
        *_sizes(comparison),
        *_texts(comparison),
        *_tasks(comparison),
        *_running(comparison.model.layers),
    ]
    subjects: list[Subject] = [original, *(row for row in comparison.rows if row.status == "ok")]
    return [
        field
        for field in candidates
        if any(field.value(subject) is not None for subject in subjects)
    ]


def change_text(comparison: Comparison, entry: Entry) -> str:
    """An entry's mean change of log-perplexity, with its interval or, of several seeds, spread."""
    found = change(comparison, entry)
    if found is None:
        return NONE
    form = fixed(3)
    spread = entry.spread(lambda row: score(comparison, row))
    if spread is not None:
        return f"{form(found.value)} ± {form(spread)}"
    if found.low is None or found.high is None:
        return form(found.value)
    mark = DOUBT if few_windows(comparison.original.texts) else ""
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]{mark}"


def kept(comparison: Comparison) -> Value:
    """Share of the parameters that is stored of what the budgets are of, of any row."""
    before = comparison.original.sizes
    whose = comparison.budgets[0].of if comparison.budgets else "experts"

    def targets(subject: Subject) -> float | None:
        found = subject.scope if isinstance(subject, Row) else None
        if found is None or found.unit != "parameters" or not found.original:
            return None
        return found.attained / found.original

    if whose == "targets":
        return targets
    name = "expert_parameters" if whose == "experts" else "parameters"
    return _share(name, getattr(before, name))


def _share(name: str, whole: int | None) -> Value:
    """Of one of the sizes, as a share of the original's."""

    def value(subject: Subject) -> float | None:
        part = getattr(subject.sizes, name) if subject.sizes else None
        return part / whole if part is not None and whole else None

    return value


def leaders(fields: Iterable[Field], entries: Iterable[Entry]) -> set[tuple[str, str]]:
    """Which entries have the best figure of which column, as (key of the row, key of the field)."""
    found = set()
    done = [entry for entry in entries if entry.done]
    for field in fields:
        if field.better is None or field.part != "quality" or field.key.split(":")[0] in NOISY:
            continue
        values = [(entry.mean(field.value), entry) for entry in done]
        known = [(value, entry) for value, entry in values if value is not None]
        if len(known) > 1:
            best = (min if field.better == "low" else max)(value for value, _ in known)
            found |= {(entry.row.key, field.key) for value, entry in known if value == best}
    return found


def _field(
    key: str,
    title: str,
    value: Value,
    form: Format,
    better: Literal["low", "high"] | None,
    rank: int,
    part: Literal["quality", "cost"] = "cost",
) -> Field:
    return Field(key, title, HELP[key.split(":")[0]], value, form, better, part, rank)


def _sizes(comparison: Comparison) -> list[Field]:
    def of(name: str) -> Value:
        return lambda subject: getattr(subject.sizes, name) if subject.sizes else None

    def share(name: str) -> Value:
        return _share(name, getattr(comparison.original.sizes, name))

    whose = comparison.budgets[0].of if comparison.budgets else "experts"
    return [
        _field("kept", f"{whose} kept", kept(comparison), percent, None, 1, "quality"),
        _field("bytes_share", "bytes kept", share("bytes"), percent, None, 2, "quality"),
        _field("parameters", "parameters", of("parameters"), count, None, 20),
        _field("parameters_share", "of original", share("parameters"), percent, None, 21),
        _field("active_parameters", "active", of("active_parameters"), count, None, 8),
        _field("flops_per_token", "FLOPs/token", of("flops_per_token"), count, None, 22),
        _field("bytes", "bytes", of("bytes"), size, None, 23),
        _field("expert_bytes_share", "experts' bytes", share("expert_bytes"), percent, None, 24),
    ]


def _texts(comparison: Comparison) -> list[Field]:
    def text(name: str) -> Value:
        return lambda subject: subject.texts[name].perplexity if name in subject.texts else None

    def lost(subject: Subject) -> float | None:
        return score(comparison, subject) if isinstance(subject, Row) else None

    def together(subject: Subject) -> float | None:
        return subject.overall.perplexity if subject.overall else None

    def divergence(of: Literal["kl", "agreement"]) -> Value:
        def value(subject: Subject) -> float | None:
            found = subject.overall.divergence if subject.overall else None
            figure = getattr(found, of) if found else None
            return figure.value if figure else None

        return value

    several = len(comparison.texts) > 1
    return [
        *(
            _field(f"perplexity:{name}", f"ppl {name}", text(name), perplexity, "low", 4, "quality")
            for name in comparison.texts
        ),
        *(
            [_field("overall", "ppl together", together, perplexity, "low", 11, "quality")]
            if several
            else []
        ),
        _field("change", "Δ log-ppl", lost, fixed(3), "low", 3, "quality"),
        _field("kl", "KL", divergence("kl"), scientific, "low", 6, "quality"),
        _field("agreement", "agreement", divergence("agreement"), percent, "high", 7, "quality"),
    ]


def _tasks(comparison: Comparison) -> list[Field]:
    def task(name: str) -> Value:
        return lambda subject: subject.tasks[name].value if name in subject.tasks else None

    def average(subject: Subject) -> float | None:
        return subject.average.value if subject.average else None

    def retained(subject: Subject) -> float | None:
        mine, full = subject.average, comparison.original.average
        if mine is None or full is None or full.chance is None or full.value == full.chance:
            return None
        return (mine.value - full.chance) / (full.value - full.chance)

    def stderr(name: str) -> Value:
        return lambda subject: subject.tasks[name].stderr if name in subject.tasks else None

    def error_of_mean(subject: Subject) -> float | None:
        errors = [task.stderr for task in subject.tasks.values()]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None

    full = comparison.original
    found = []
    for name in comparison.tasks:
        one = _field(f"task:{name}", name, task(name), fixed(3), "high", 12, "quality")
        guess = full.tasks[name].chance if name in full.tasks else None
        found.append(dataclasses.replace(one, error=stderr(name), chance=guess))
    mean = _field("average", "tasks", average, fixed(3), "high", 5, "quality")
    return [
        dataclasses.replace(
            mean, error=error_of_mean, chance=full.average.chance if full.average else None
        ),
        _field("retained", "above chance", retained, percent, "high", 9, "quality"),
        *found,
    ]


def _running(layers: int) -> list[Field]:
    def speed(part: Literal["prefill", "decode"]) -> Value:
        def value(subject: Subject) -> float | None:
            found = getattr(subject.speed, part) if subject.speed else None
            return found.value if found else None

        return value

    def error(subject: Subject) -> float | None:
        last = final_errors(subject, layers) if isinstance(subject, Row) else {}
        return statistics.fmean(last.values()) if last else None

    def spent(subject: Subject) -> float | None:
        return subject.seconds.get("compress") if isinstance(subject, Row) else None

    def memory(subject: Subject) -> float | None:
        return subject.peak_memory_bytes

    return [
        _field("layer_error", "layer error", error, scientific, "low", 10),
        _field("prefill", "prefill tok/s", speed("prefill"), rate, "high", 25),
        _field("decode", "decode tok/s", speed("decode"), rate, "high", 26),
        _field("peak_memory", "peak memory", memory, size, "low", 27),
        _field("seconds", "compress", spent, duration, "low", 28),
    ]


def final_errors(row: Row, layers: int) -> dict[int, float]:
    """Layer → relative squared error of its output after the last pass; 0 where it was left alone.

    Args:
        row: The row.
        layers: How many the model has.
    """
    last = {point.layer: point.error for point in row.trace}
    return {layer: last.get(layer, 0.0) for layer in range(layers)} if last else {}
