"""Everything that a recipe's `evaluate` section asks of one model, in memory or streamed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError
from .divergence import Divergence, LogitStore, Watcher, Writer, shared_out, watched
from .harness import load_tasks, run_tasks
from .loading import load_model, load_tokenizer, resolve_device, versions, weights_fit
from .memory import PeakMemory
from .perplexity import (
    Perplexity,
    forward_logits,
    paired_bootstrap,
    score,
    streamed_logits,
)
from .speed import measure_speed

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Source
    from ..data import TokenWindows
    from ..recipe import Evaluate

Streamed = bool | Literal["auto"]
Report = Callable[[str, int, int], None]
"""Is called with what is being done, how much of it is done (windows or layers), and how much
there is."""


def evaluate_model(
    path: str | Path,
    section: Evaluate,
    *,
    device: str = "auto",
    dtype: str = "auto",
    streamed: Streamed = "auto",
    batch_size: int = 1,
    trust_remote_code: bool = False,
    num_fewshot: int | None = None,
    task_path: Sequence[str | Path] = (),
    seed: int | None = None,
    report: Report | None = None,
    keep: Path | None = None,
    against: Path | None = None,
    check: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Evaluates one model directory.

    Args:
        path: The directory of an original or a compressed model.
        section: A recipe's `evaluate` section.
        device: "auto" takes the first GPU if there is one.
        dtype: Compute dtype by torch's name; "auto" is the checkpoint's.
        streamed: Whether one decoder layer is in memory at a time; "auto" streams if the weights
            do not fit into the free memory.
        batch_size: Windows (and lm-eval's requests) per forward pass.
        trust_remote_code: Whether code that the directory carries may run.
        num_fewshot: Examples in a task's prompt; None leaves it to each task.
        task_path: Directories with more lm-eval tasks.
        seed: Of lm-eval's few-shot examples; None is lm-eval's default.
        report: Told of progress.
        keep: Where to keep the logits that others' divergence is measured from.
        against: Where the original's were kept.
        check: Is called with the loaded model, if it is in memory, before anything is measured.

    Returns:
        "perplexity" {name: `Perplexity.to_json`}, "divergence" {name: `Divergence.to_json`},
        "tasks" {name: see `run_tasks`}, "speed" (see `measure_speed`; None where the model is
        streamed), "mode" ("in memory" or "streamed") with "mode_reason", "device", "dtype",
        "batch_size", "versions", "warnings", "peak_memory_bytes", "seconds". JSON-able.

    Raises:
        UserError: Text, task, model or device is not there or does not fit.
    """
    from .. import runtime
    from ..checkpoint import Source
    from ..data import evaluation_windows
    from ..models import load_config, resolve_dtype

    runtime.register()
    started = time.monotonic()
    tasks = list(section.tasks)
    source = Source(path)
    where = resolve_device(device)
    compute = resolve_dtype(dtype, load_config(source.path, source.config, trust_remote_code))
    tokenizer = load_tokenizer(source.path, trust_remote_code)
    texts = {
        text.name: evaluation_windows(tokenizer, text, text.length, text.windows)
        for text in section.perplexity
    }
    warnings: list[str] = []

    longest = max((windows.ids.shape[1] for windows in texts.values()), default=0)
    logits = batch_size * longest * len(tokenizer) * 8
    fits, reason = weights_fit(source, compute, where, logits)
    if streamed == "auto":
        stream = not fits
    else:
        stream, reason = streamed, "asked for"
    if stream and tasks:
        if streamed is True:
            raise UserError("tasks need the weights in memory; leave out tasks or streaming")
        warnings.append(f"tasks {', '.join(tasks)} were left out: they need {reason}")
        tasks = []

    loaded = load_tasks(tasks, task_path) if tasks else None
    say = report or (lambda what, done, total: None)
    memory = PeakMemory(where)
    accuracy: dict[str, Any] = {}
    speed: dict[str, Any] | None = None
    with _watchers(section, texts, keep, against) as watchers:
        if stream:
            found = _stream(
                source, texts, where, compute, batch_size, trust_remote_code, say, watchers
            )
        else:
            model = load_model(source.path, where, compute, trust_remote_code)
            if check is not None:
                check(model)
            found = {}
            for name, windows in texts.items():
                progress = _about(say, f"perplexity of {name}")
                batches = forward_logits(model, windows.ids, batch_size, progress)
                if name in watchers:
                    batches = watched(batches, [(0, watchers[name])])
                _, sums = score(batches)
                found[name] = Perplexity(windows.ids.shape[1], tuple(sums), windows.digest)
    peak = memory.bytes()
    if not stream:
        if loaded is not None:
            what = f"tasks {', '.join(tasks)}"
            options: dict[str, Any] = {
                "num_fewshot": num_fewshot,
                "limit": section.limit,
                "seed": seed,
            }
            say(what, 0, 1)
            accuracy = run_tasks(model, tokenizer, loaded, batch_size=batch_size, **options)
            say(what, 1, 1)
        if section.speed is not None:
            say("speed", 0, 1)
            first = next(iter(texts.values()), None)
            speed = measure_speed(model, first.ids if first else None, section.speed)
            say("speed", 1, 1)
        del model
    elif section.speed is not None:
        warnings.append(f"speed was not measured: that needs {reason}")
    warnings += [
        f"perplexity of {name} is {value.perplexity}"
        for name, value in found.items()
        if not math.isfinite(value.perplexity)
    ]
    apart = {name: watcher.result() for name, watcher in watchers.items()}
    return {
        "model": str(path),
        "perplexity": {name: value.to_json() for name, value in found.items()},
        "divergence": {
            name: value.to_json() for name, value in apart.items() if isinstance(value, Divergence)
        },
        "tasks": accuracy,
        "speed": speed,
        "mode": "streamed" if stream else "in memory",
        "mode_reason": reason,
        "device": where,
        "dtype": str(compute).removeprefix("torch."),
        "batch_size": batch_size,
        "versions": versions(),
        "warnings": warnings,
        "peak_memory_bytes": peak,
        "seconds": time.monotonic() - started,
    }


@contextmanager
def _watchers(
    section: Evaluate,
    texts: Mapping[str, TokenWindows],
    keep: Path | None,
    against: Path | None,
) -> Iterator[dict[str, Watcher]]:
    """What keeps or compares the logits of each text; logits that are kept are whole afterwards."""
    if section.divergence is None or (keep is None and against is None):
        yield {}
        return
    shapes = {name: windows.ids.shape for name, windows in texts.items()}
    counts = shared_out(
        {name: shape[0] for name, shape in shapes.items()},
        {name: shape[1] for name, shape in shapes.items()},
        section.divergence.tokens,
    )
    store = LogitStore(against) if against is not None else None
    writer = Writer(keep) if keep is not None else None
    try:
        yield {
            name: Watcher(
                name,
                windows.digest,
                counts[name],
                shapes[name][1],
                writer,
                store.logits(name, windows.digest) if store is not None else None,
            )
            for name, windows in texts.items()
        }
        if writer is not None:
            writer.finish()
    finally:
        if writer is not None:
            writer.discard()


def compare(
    original: Mapping[str, Any], compressed: Mapping[str, Any], seed: int = 0
) -> dict[str, dict[str, float]]:
    """Paired bootstrap of two results of `evaluate_model`.

    Args:
        original: The baseline.
        compressed: The model that is judged.
        seed: Seed of the resampling.

    Returns:
        By text set: "delta_log_ppl" (positive: the compressed model is worse), "low", "high". Sets
        that were not measured on the same tokens by the same protocol are left out.
    """
    paired = {}
    for name, a in original["perplexity"].items():
        b = compressed["perplexity"].get(name)
        if b is None or (a["protocol"], a["digest"]) != (b["protocol"], b["digest"]):
            continue
        if None in a["window_nll"] or None in b["window_nll"]:
            continue
        each = a["tokens"] / a["windows"]
        delta, low, high = paired_bootstrap(a["window_nll"], b["window_nll"], each, seed=seed)
        paired[name] = {"delta_log_ppl": delta, "low": low, "high": high}
    return paired


def _about(report: Report, what: str) -> Callable[[int, int], None]:
    return lambda done, total: report(what, done, total)


def _stream(
    source: Source,
    texts: Mapping[str, TokenWindows],
    device: str,
    dtype: torch.dtype,
    batch_size: int,
    trust_remote_code: bool,
    report: Report,
    watchers: Mapping[str, Watcher],
) -> dict[str, Perplexity]:
    """Scores all texts of one window length in one sweep: each reads every weight once."""
    import torch

    from ..sweep import StreamedModel

    name_of = str(dtype).removeprefix("torch.")
    model = StreamedModel(source, device, name_of, trust_remote_code)
    found: dict[str, Perplexity] = {}
    for length in sorted({windows.ids.shape[1] for windows in texts.values()}):
        group = {name: w for name, w in texts.items() if w.ids.shape[1] == length}
        progress = _about(report, f"perplexity of {', '.join(group)}, layer by layer")
        ids = torch.cat([windows.ids for windows in group.values()])
        first, seeing = 0, []
        for name, windows in group.items():
            if name in watchers:
                seeing.append((first, watchers[name]))
            first += len(windows.ids)
        batches = streamed_logits(model, ids, batch_size, progress)
        _, sums = score(watched(batches, seeing) if seeing else batches)
        first = 0
        for name, windows in group.items():
            last = first + len(windows.ids)
            found[name] = Perplexity(length, tuple(sums[first:last]), windows.digest)
            first = last
    return {name: found[name] for name in texts}
