"""What the processes that load results share: questions and answers, a line of JSON each.

It imports nothing: what is loaded in such a process is what is looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def serve(answer: Callable[..., dict]) -> None:
    """Answers each line of standard input, a mapping of arguments, until it ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)
