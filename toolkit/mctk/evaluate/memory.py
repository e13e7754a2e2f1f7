"""Peak memory of a stretch of work."""

from __future__ import annotations

from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The most memory that is taken from here on: of a GPU by torch, else of the process.

    On a CPU that is the resident set, libraries included, by Linux's own count; other systems
    cannot count from the middle of a process.

    Args:
        device: "cpu", "cuda:0" ...
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._counts = True
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
        except OSError:
            self._counts = False

    def bytes(self) -> int | None:
        """The peak so far; None where it cannot be told."""
        if self._device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated(self._device)
        if not self._counts:
            return None
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
