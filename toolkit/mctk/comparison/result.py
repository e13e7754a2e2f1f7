"""A comparison's result: what was asked of every row and what came of it; comparison.json.

Whatever draws tables and figures reads this and nothing else. Shares are fractions, sizes counts or
bytes, times seconds, errors relative squared errors of a layer's output, divergences nats a token.
A figure that was not taken, or is not finite, is None.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from ..files import write_json
from .scores import Average, Divergence, Interval, Overall, Speed, TaskScore, TextScore

__all__ = [
    "SCHEMA", "Average", "BankSize", "Budget", "Calibration", "Comparison", "Divergence", "Flag",
    "Interval", "Model", "Original", "Overall", "Row", "Scope", "Sizes", "Speed", "Status",
    "StepText", "TaskScore", "TextScore", "TracePoint", "from_json", "load", "save", "to_json",
]  # fmt: skip

SCHEMA = 1  # of comparison.json; raised whenever a reader would misread it
Status = Literal["ok", "failed", "refused", "pending"]


@dataclass(frozen=True)
class Budget:
    """What a row was asked to store.

    Attributes:
        remove: Share to remove, between 0 and 1.
        of: What the share is of.
        unit: What is counted.
    """

    remove: float
    of: Literal["model", "experts", "targets"] = "model"
    unit: Literal["parameters", "bytes"] = "parameters"


@dataclass(frozen=True)
class Scope:
    """The budget's scope before and after; of a row without a budget, the experts.

    Attributes:
        of: What is counted: "model", "experts" or "targets".
        unit: "parameters" or "bytes".
        original: What the original stores there.
        allowed: What the budget allows; None without a budget.
        attained: What is stored.
    """

    of: str
    unit: str
    original: int
    allowed: int | None
    attained: int


@dataclass(frozen=True)
class Sizes:
    """A whole model's size, measured on its files.

    Attributes:
        parameters: Stored weight elements, tied ones once.
        active_parameters: Those that one token passes through.
        bytes: Tensor payload: positions, scales and packed bits as they are stored.
        macs_per_token: Multiply-adds of the weight matrices for one token.
        expert_parameters: Stored weight elements of the routed experts.
        expert_bytes: Payload of the routed experts.
    """

    parameters: int
    active_parameters: int
    bytes: int
    macs_per_token: int
    expert_parameters: int
    expert_bytes: int | None = None

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of the weight matrices for one token: two a multiply-add."""
        return 2 * self.macs_per_token


@dataclass(frozen=True)
class TracePoint:
    """What one pass left of one layer.

    Attributes:
        layer: The layer's number.
        step: "stage/method", or "as stored".
        error: Relative squared error of the layer's output after it.
    """

    layer: int
    step: str
    error: float


@dataclass(frozen=True)
class BankSize:
    """What a row stores of one bank of one layer.

    Attributes:
        layer: The layer's number.
        bank: The bank's name, e.g. "experts.gate".
        setting: What the sized step chose: a rank, how many experts stay, ...; None if the bank was
            left whole or no step has a size.
        summary: The terms in words.
        parameters: Stored weight elements.
        bytes: Payload.
        original: Weight elements of the original.
        error: Relative squared error of the weights; None where they do not correspond.
    """

    layer: int
    bank: str
    setting: int | None
    summary: str
    parameters: int
    bytes: int
    original: int
    error: float | None = None


@dataclass(frozen=True)
class StepText:
    """One step of a row: its method with version, and what the recipe says of it."""

    method: str
    version: int
    targets: list[str]
    layers: str
    size: str | None
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The method without its stage."""
        return self.method.split("/")[-1]


@dataclass(frozen=True)
class Flag:
    """Something a reader of a row's figures should know.

    Attributes:
        code: "coarse" (the method's sizes are coarser than the budget: the next smaller one),
            "bytes" (its budget counts bytes), "few tokens", "not finite", "constant answers",
            "gate left out", "sequential" (calibrated on its own compressed prefix), "few windows"
            (too few for its intervals), "warning".
        text: In a sentence.
    """

    code: str
    text: str


@dataclass(frozen=True)
class Row:
    """One method at one budget with one seed.

    Attributes:
        name: Of the method in the comparison's file; the same at all budgets and seeds.
        label: What to call it in tables.
        family: What it does in one word, for colours: the stages of its steps joined by "+".
        key: Of this row among all: its directory's name as well.
        steps: Its methods, in order.
        chain: The same as one text with versions.
        allocate: The allocator with its version; None where nothing is allocated.
        propagate: Which activations fed its statistics: "original" or "compressed".
        budget: What it was asked; None of a row that has what its steps say.
        seed: Of its calibration.
        status: "ok"; "failed" while it worked; "refused" by its plan; "pending" if not yet run.
        reason: Why there are no figures.
        path: Its directory.
        output_kind: "native" or "mctk".
        sizes: Of the whole model.
        scope: Of the budget's scope.
        texts: By name of a text.
        overall: Over all texts.
        tasks: By name of a task.
        average: Over the tasks.
        speed: If asked for.
        peak_memory_bytes: Largest resident set of the process that evaluated it, if asked for.
        seconds: Work of its own: "compress", "gate", "evaluate". What rows share, above all
            calibration, stands in `Comparison.seconds`.
        trace: Of every layer after every pass.
        banks: Of every bank that was rewritten.
        experts_kept: Layer → numbers of the experts that stay, of rows that remove some.
        flags: What to know of its figures.
        fingerprint: SHA-256 of its recipe with the methods' versions.
    """

    name: str
    label: str
    family: str
    key: str
    steps: list[StepText]
    chain: str
    allocate: str | None = None
    propagate: str = "original"
    budget: Budget | None = None
    seed: int = 0
    status: Status = "pending"
    reason: str | None = None
    path: str | None = None
    output_kind: str | None = None
    sizes: Sizes | None = None
    scope: Scope | None = None
    texts: dict[str, TextScore] = field(default_factory=dict)
    overall: Overall | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    average: Average | None = None
    speed: Speed | None = None
    peak_memory_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    trace: list[TracePoint] = field(default_factory=list)
    banks: list[BankSize] = field(default_factory=list)
    experts_kept: dict[int, list[int]] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    fingerprint: str | None = None


@dataclass(frozen=True)
class Original:
    """The model that all rows started from."""

    sizes: Sizes
    texts: dict[str, TextScore] = field(default_factory=dict)
    overall: Overall | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    average: Average | None = None
    speed: Speed | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Calibration:
    """The text that methods saw, the same for all rows of one seed."""

    seed: int
    digest: str | None
    sequences: int
    length: int
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    """What was compressed."""

    name: str
    path: str
    model_type: str
    layers: int
    experts: int | None
    experts_per_token: int
    fingerprint: str
    license: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found.

    Attributes:
        schema: `SCHEMA` of the mctk that wrote it.
        name: Of the comparison: its file's.
        model: What was compressed.
        dtype: Of computation.
        device: Where it was computed.
        calibrations: One for each seed.
        original: The model that all started from.
        budgets: In the order of the file; rows without a budget belong to none.
        rows: In the order of the file, then of budgets, then of seeds.
        texts: Names of the perplexity texts, in order.
        tasks: Names of the tasks.
        protocols: Of everything that was measured, each once.
        seconds: Of every phase, over all calls that made something of it; "total": by the clock.
        calls: How many those are; None where that was not counted.
        statistics: Counters of the shared calibration: sweeps, cache hits and misses.
        structure: What figures show of the original itself: see `mctk.comparison.structure`.
        versions: Of mctk and of the libraries.
        command: The command line.
        source: The comparison's file, as written.
        finished: Whether no row is pending.
        made: When, ISO 8601 in UTC.
    """

    schema: int
    name: str
    model: Model
    dtype: str
    device: str
    calibrations: list[Calibration]
    original: Original
    budgets: list[Budget]
    rows: list[Row]
    texts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    protocols: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: int | None = None
    statistics: dict[str, Any] | None = None
    structure: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    source: str | None = None
    finished: bool = False
    made: str | None = None

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the tables of comparison.md."""
        from .markdown import markdown

        return markdown(self)

    def at(self, budget: Budget | None) -> list[Row]:
        """The rows of one budget, in order; None: those without one.

        Rows in bytes stand with those of the same share in parameters.
        """
        if budget is None:
            return [row for row in self.rows if row.budget is None]
        asked = (budget.remove, budget.of)
        return [r for r in self.rows if r.budget and (r.budget.remove, r.budget.of) == asked]


_ADAPTER = TypeAdapter(Comparison)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON data; what is not finite becomes null."""
    data: dict[str, Any] = json.loads(_ADAPTER.dump_json(comparison))
    return data


def from_json(data: Any) -> Comparison:
    """The inverse of `to_json`.

    Raises:
        UserError: It is no comparison, or one of another schema.
    """
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise UserError(f"no comparison of schema {SCHEMA}: its schema is {found!r}")
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"comparison: {where}: {problem['msg']}") from error


def save(comparison: Comparison, path: Path) -> None:
    """Writes comparison.json."""
    write_json(path, to_json(comparison))


def load(path: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
        UserError: The file is missing, damaged or of another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such comparison") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    try:
        return from_json(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
