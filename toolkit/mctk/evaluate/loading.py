"""Loads what is evaluated: device, tokenizer, the whole model, and whether that fits."""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UserError, brief

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Source as Checkpoint
    from ..data import Source

# Of the free memory, what weights and logits may take: the rest is for activations and the cache.
_USABLE = 0.8


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
    """The whole model in memory, by `from_pretrained`, or of several speakers the one that writes.

    Weights that are stored quantised are dequantised as they are when the model is streamed; on a
    GPU transformers would compute with them as they are, other numbers than those compressed.

    Of tensors that mctk lists as unread transformers' report is not shown: they are no failure, and
    plan and report have said what they are.

    Raises:
        CheckpointError: Tensors are missing or contradict config.json.
    """
    from transformers.utils import logging as progress_bars

    from ..checkpoint import Source, fill
    from ..models import auto_class, language_part
    from ..runtime import restore_buffers
    from ..sweep import StreamedModel

    # transformers fills what a checkpoint lacks with random numbers; the headers tell before.
    source, name = Source(path), str(dtype).removeprefix("torch.")
    streamed = StreamedModel(source, device, name, trust_remote_code)
    if source.quantised is not None:
        streamed.load_outer()
        for module, tensors in zip(streamed.layers, streamed.layer_tensors, strict=True):
            fill(streamed.model, source, tensors, device, module)
        return streamed.language
    placed = {} if device == "cpu" else {"device_map": {"": device}}
    shown = progress_bars.is_progress_bar_enabled()
    progress_bars.disable_progress_bar()  # progress is ours to tell
    try:
        with _report_held() as held:
            model, info = auto_class(streamed.config).from_pretrained(
                str(path),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **placed,
            )
            if streamed.unread.names:
                held.clear()
    finally:
        if shown:
            progress_bars.enable_progress_bar()
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise CheckpointError(
            f"{path}: transformers found no {missing} for {type(model).__name__}, and filled in "
            "random numbers"
        )
    restore_buffers(model)  # transformers leaves those of remote code uninitialised
    return language_part(model.eval())[1]


@contextlib.contextmanager
def _report_held() -> Iterator[list[logging.LogRecord]]:
    """Holds transformers' reports of what it found while loading; at the end tells those left."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield held
    finally:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)


def weights_fit(
    source: Checkpoint, dtype: torch.dtype, device: str, logits: int = 0
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


def text_stamps(texts: Iterable[Source]) -> list[list[Any]]:
    """Local texts by path, size and time, so that an edited file is noticed."""
    stamps = []
    for text in texts:
        for file in text.files() if text.dataset is None else []:
            stat = Path(file).stat()
            stamps.append([str(file), stat.st_size, stat.st_mtime_ns])
    return stamps


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("mctk", "torch", "transformers", "lm_eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
