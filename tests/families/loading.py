"""Results loaded in a process that did not write them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path


class FreshProcess:
    """A process that loads results, started when it is first asked, and again if it dies.

    Args:
        program: What it runs, a file beside this one: `fresh.py` imports mctk as a user does, and
            `plain.py` never does.
    """

    def __init__(self, program: str = "fresh.py") -> None:
        self._program = Path(__file__).parent / program
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, str], seconds: float = 300) -> dict[str, str]:
        """Has a checkpoint loaded as the program says; "fresh", "again" → "works" or why not."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(seconds, process.kill)
        watch.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        code = process.wait()
        self._process = None
        return dict.fromkeys(("fresh", "again"), f"the process that loads it died ({code})")

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, str(self._program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self._process

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


FRESH = FreshProcess()
"""One with mctk, for all families that this process checks."""
