"""Peak memory of this process and of its device."""

from __future__ import annotations

import resource
import sys


def peak_process_bytes() -> int:
    """The largest resident set so far, by the operating system's own count."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes(device: str) -> int | None:
    """The most that torch had allocated on a GPU; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)
