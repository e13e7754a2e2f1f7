"""Draws what a command prints as a picture of a terminal, for pages that people look at first.

    python docs/site/terminal.py docs/figures/run.svg -- mctk run recipes/svdllm_demo.yaml ...

The command runs; its progress goes to the real terminal, and its output into the picture.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text


def draw(command: list[str], output: str) -> str:
    """A command and what it printed, as SVG.

    Args:
        command: Its words.
        output: Lines, without colours.
    """
    lines = output.rstrip().splitlines()
    width = max(len(line) for line in [f"$ {shlex.join(command)}", *lines])
    console = Console(record=True, width=width + 1, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}", style="bold green"))
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    picture = console.export_svg(title="", theme=MONOKAI)
    # Nothing is loaded from elsewhere: the reader's own monospaced font will do.
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    return picture.replace("Fira Code, monospace", "monospace")


if __name__ == "__main__":
    target, words = Path(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    target.write_text(draw(words, done.stdout), encoding="utf-8")
