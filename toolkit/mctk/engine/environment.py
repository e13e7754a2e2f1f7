"""What a run was made with and on: enough to make it again, and nothing of whose machine it was."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..sweep import StreamedModel

# What may move a figure, or explain why something does not load, beside what `versions` has.
PACKAGES = (
    "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy", "scipy", "datasets"
)  # fmt: skip


def packages() -> dict[str, str]:
    """Versions of `PACKAGES`, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment(model: StreamedModel) -> dict[str, Any]:
    """Records where a run computed, and from which source of mctk.

    Args:
        model: The original, for device and dtype.

    Returns:
        JSON-able: "platform", "device", "device_name", "cuda" (None on a CPU), "threads", "dtype",
        "mctk_commit" (None where it is not known).
    """
    on_gpu = model.device.type == "cuda"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if on_gpu else _processor(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "mctk_commit": source_commit(),
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def source_commit(directory: Path = Path(__file__).parents[3]) -> str | None:
    """The commit of mctk's source: of the clone that runs, or that it was installed from.

    Args:
        directory: The clone, if there is one.

    Returns:
        The commit, with "+" behind it where files that git knows have changed; None if it is
        unknown.
    """
    if (directory / ".git").exists():
        try:
            commit = _git(directory, "rev-parse", "HEAD")
            changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
        except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
            return None
        return commit + ("+" if changed else "")
    try:
        origin = metadata.distribution("mctk").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    found: str | None = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return found


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(directory), *arguments],
        capture_output=True, text=True, check=True, timeout=10,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # another git may be at work there
    )  # fmt: skip
    return done.stdout.strip()
