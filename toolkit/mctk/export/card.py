"""The model card of an export: the compressed model's, with a word on what this directory is."""

from __future__ import annotations

import re
from pathlib import Path

from ..files import write_text

DENSE = """\
> **Multiplied out.** The terms of the compressed model were multiplied back into the original
> architecture (`mctk export --dense`). It loads without mctk and computes the same up to rounding;
> it is as large and as slow as the original. The sizes below are the compressed model's."""
CONSTANTS = """\
> **Expert substitution.** Some experts are constants. The layout is that of vLLM's open pull
> request 50415 (`mctk export --expert-substitution`); transformers cannot load it. The sizes below
> are the compressed model's."""


def write_card(source: Path, output: Path, constants: bool) -> None:
    """Copies the model card, if there is one, with a note on top and without `import mctk`.

    Args:
        source: The compressed model's directory.
        output: Where the export is written.
        constants: Whether it is an expert substitution.
    """
    if not (source / "README.md").is_file():
        return
    text = (source / "README.md").read_text(encoding="utf-8")
    head = ""
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        end = text.index("\n---\n", 4) + len("\n---\n")
        head, text = text[:end] + "\n", text[end:].lstrip("\n")
    if constants:  # how to load it in transformers is what cannot be done
        text = re.sub(r"^## Use$.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```bash\npip install mctk\n```\n+|^import mctk\b.*\n", "", text, flags=re.M)
    write_text(output / "README.md", f"{head}{CONSTANTS if constants else DENSE}\n\n{text}")
