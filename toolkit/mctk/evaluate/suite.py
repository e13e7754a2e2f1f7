"""Everything that a recipe's `evaluate` section asks of one model, in memory or streamed."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError, brief
from .harness import load_tasks, run_tasks
from .perplexity import (
    Perplexity,
    forward_logits,
    paired_bootstrap,
    perplexity,
    score,
    streamed_logits,
)

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Source
    from ..data import TokenWindows
    from ..recipe import Evaluate

Streamed = bool | Literal["auto"]
Report = Callable[[str, int, int], None]
"""Is called with what is being done, how much of it is done (windows or layers), and how much
there is."""

# Of the free memory, what weights and logits may take: the rest is for activations and the cache.
_USABLE = 0.8


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

    Returns:
        "perplexity" {name: `Perplexity.to_json`}, "tasks" {name: see `run_tasks`}, "mode"
        ("in memory" or "streamed") with "mode_reason", "device", "dtype", "batch_size",
        "versions", "warnings", "seconds". JSON-able.

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
    accuracy: dict[str, Any] = {}
    if stream:
        found = _stream(source, texts, where, compute, batch_size, trust_remote_code, say)
    else:
        model = load_model(source.path, where, compute, trust_remote_code)
        found = {}
        for name, windows in texts.items():
            progress = _about(say, f"perplexity of {name}")
            found[name] = perplexity(forward_logits(model, windows.ids, batch_size, progress))
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
        del model
    warnings += [
        f"perplexity of {name} is {value.perplexity}"
        for name, value in found.items()
        if not math.isfinite(value.perplexity)
    ]
    return {
        "model": str(path),
        "perplexity": {name: value.to_json() for name, value in found.items()},
        "tasks": accuracy,
        "mode": "streamed" if stream else "in memory",
        "mode_reason": reason,
        "device": where,
        "dtype": str(compute).removeprefix("torch."),
        "batch_size": batch_size,
        "versions": versions(),
        "warnings": warnings,
        "seconds": time.monotonic() - started,
    }


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
        _, sums = score(streamed_logits(model, ids, batch_size, progress))
        first = 0
        for name, windows in group.items():
            last = first + len(windows.ids)
            found[name] = Perplexity(length, tuple(sums[first:last]), windows.digest)
            first = last
    return {name: found[name] for name in texts}


def resolve_device(device: str) -> str:
    """Turns "auto" into the first GPU or the CPU, and checks that the device is there."""
    import torch

    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device: no such device {device!r}; try auto, cpu or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device} was asked for, but torch sees no GPU")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps was asked for, but torch does not offer it here")
    return device


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer that a model directory carries."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types for a missing or bad tokenizer
        raise UserError(f"{path}: no usable tokenizer: {brief(error)}") from error
    # Where the files are missing, some families give a tokenizer with an empty vocabulary.
    if not tokenizer("a text", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{path}: no usable tokenizer: it turns text into nothing")
    return tokenizer


def load_model(path: Path, device: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The whole model in memory, by `from_pretrained`.

    Raises:
        CheckpointError: Tensors are missing or contradict config.json.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ..checkpoint import Source
    from ..runtime import restore_buffers
    from ..sweep import StreamedModel

    # transformers fills what a checkpoint lacks with random numbers; the headers tell before.
    StreamedModel(Source(path), trust_remote_code=trust_remote_code)
    placed = {} if device == "cpu" else {"device_map": {"": device}}
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # progress is ours to tell
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, trust_remote_code=trust_remote_code, **placed
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    restore_buffers(model)  # transformers leaves those of remote code uninitialised
    return model.eval()


def weights_fit(
    source: Source, dtype: torch.dtype, device: str, logits: int = 0
) -> tuple[bool, str]:
    """Whether the weights, in the compute dtype, fit into the device's free memory.

    Args:
        source: The model directory.
        dtype: Compute dtype.
        device: "cpu" or a GPU.
        logits: Bytes that a batch's logits take besides.

    Returns:
        The answer and the figures behind it.
    """
    from ..checkpoint.source import FLOATING

    weights = sum(
        info.numel * dtype.itemsize if info.dtype in FLOATING else info.nbytes
        for info in source.tensors.values()
    )
    needed, free = weights + logits, free_memory(device)
    reason = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free on {device}"
    return needed <= _USABLE * free, reason


def free_memory(device: str) -> int:
    """Free bytes on a device; on the CPU also within the limit of a container."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").open())
    except (OSError, ValueError):  # no such file, or the limit is "max"
        return free
    # Pages of files that were read count as used, but give way.
    return min(free, limit - used + int(statistics.get("inactive_file", 0)))


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("mctk", "torch", "transformers", "lm_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
