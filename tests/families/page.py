"""docs/families.md, written from what became of every family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import transformers

from .outcome import COLUMNS, WORKS, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_HEAD = """# Families

{working} of the {all} modelling files of transformers {version} that run experts through its
experts interface work completely{rest}. This page is written by

```sh
make families
```

which takes a tiny random model of each through the toolkit: `mctk inspect` and `mctk plan` from
config and headers; every layer's banks out and back; the streamed forward, equal bit for bit to the
model's own; statistics, squared gradients among them, beside those of the whole model in memory;
D²-MoE and REAP on the experts, SVD-LLM on every matrix that is a bank; removed experts, loaded by
transformers without mctk; the three results loaded by `from_pretrained` in a process that did not
write them, with equal logits, saved again and loaded again. Sizes are tiny, architectures real:
each kind of layer that a family has occurs.

{table}

"yes" is what was tried and found equal; where there is another word the last column says why, in
the words of the error. A family is a `model_type`; what it has beside its text model (vision,
audio) is copied as it is.
"""


def page(outcomes: Mapping[str, Outcome]) -> str:
    """The page's text.

    Args:
        outcomes: By family, those that are no language models among them.
    """
    files = modelling_files()
    working = {modelling_file(name) for name, found in outcomes.items() if found.works} & files
    refused = [name for name, found in outcomes.items() if found.refused]
    rest = f"; {len(refused)} are no causal language models and are refused" if refused else ""
    if partly := len(files) - len(working) - len(refused):
        rest += f"; of {partly} the last column says what does not"
    header = ["family", *COLUMNS.values(), "remark"]
    rows = [_row(found) for _, found in sorted(outcomes.items())]
    lines = [header, ["---"] * len(header), *rows]
    return _HEAD.format(
        working=len(working),
        all=len(files),
        version=version("transformers"),
        rest=rest,
        table="\n".join("| " + " | ".join(cells) + " |" for cells in lines),
    )


def _row(outcome: Outcome) -> list[str]:
    cells = [
        "yes" if said == WORKS else "refused" if outcome.refused else "no"
        for said in (outcome.items.get(key, "not reached") for key in COLUMNS)
    ]
    remarks = [outcome.remark] if outcome.remark else []
    for said, keys in outcome.reasons().items():
        which = "" if outcome.refused else ", ".join(COLUMNS[key] for key in keys) + ": "
        remarks.append(f"{which}`{_plain(said)}`")
    return [outcome.family, *cells, "; ".join(remarks)]


def _plain(said: str) -> str:
    """A message without what is of this run alone, fit for a table's cell."""
    said = re.sub(r"(/[\w.-]+)+/([\w.-]+)", r"\2", said)
    return " ".join(said.replace("|", "\\|").replace("`", "'").split())


def modelling_files() -> set[str]:
    """The directories of the installed transformers whose modelling file has the interface."""
    root = Path(transformers.__file__).parent / "models"
    return {
        file.parent.name
        for file in root.glob("*/modeling_*.py")
        if "use_experts_implementation" in file.read_text(encoding="utf-8")
    }


def modelling_file(family: str) -> str:
    """The directory of transformers that a model type's configuration comes from."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        return ""
    return CONFIG_MAPPING[family].__module__.split(".")[2]
