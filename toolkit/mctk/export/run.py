"""An export from the compressed directory to the finished one: planned, written, measured, kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Source
from ..checkpoint.source import FLOATING
from ..checkpoint.weights import TORCH_DTYPES
from ..errors import UserError
from .card import write_card
from .difference import Difference, measure
from .layout import Layout, lay_out
from .refusals import skips
from .substitution import compression_config
from .write import building, check_disk, write_model

Progress = Callable[[str, int, int], None]
SLACK = 20_000_000  # bytes of tokenizer, config and headers


@dataclass(frozen=True)
class Exported:
    """What became of an export.

    Attributes:
        output: The directory.
        form: "dense" or "expert-substitution".
        modules: How many modules of terms were multiplied out.
        constants: How many experts are constants.
        parameters: Of the export.
        nbytes: Payload bytes of the export.
        compressed_bytes: Of what it was made of.
        notes: What the user should know.
        difference: Of the logits; None where nothing here can run the export.
    """

    output: Path
    form: str
    modules: int
    constants: int
    parameters: int
    nbytes: int
    compressed_bytes: int
    notes: list[str]
    difference: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return {
            "output": str(self.output),
            "form": self.form,
            "modules": self.modules,
            "constants": self.constants,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "compressed_bytes": self.compressed_bytes,
            "notes": self.notes,
            "difference": None if self.difference is None else self.difference.as_dict(),
        }


def export(
    path: Path,
    output: Path,
    constants: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Exports a compressed checkpoint; there is a whole directory afterwards, or none.

    Args:
        path: The compressed checkpoint.
        output: The directory to write; must not exist.
        constants: Whether to write an expert substitution instead of the dense form.
        dtype: What multiplied matrices are written in; None: what their terms are stored in.
        device: Where layers are multiplied out and compared.
        trust_remote_code: Whether code that the directory carries may run.
        progress: Is called with (what, done, total).
        say: Is told, once it is planned, what will be written.

    Raises:
        UserError: It cannot be exported, the disk is too small, or the result computes something
            else than the compressed model.
    """
    with building(output) as place:
        source = Source(path)
        layout = lay_out(source, dtype, device, trust_remote_code, constants)
        found = list(layout.tensors)
        nbytes = sum(info.nbytes for info in found)
        check_disk(output, nbytes + SLACK)
        fixed = [layer.constants for layer in layout.layers if layer.constants is not None]
        if constants:
            layout.config["compression_config"] = compression_config(fixed)
        say(f"{output}: {nbytes / 1e9:.2f} GB will be written, from {source.nbytes / 1e9:.2f} GB")
        write_model(layout, place, lambda done, total: progress("layers", done, total))
        write_card(path, place, constants)
        difference = None if constants else _checked(layout, place, trust_remote_code, progress)
    return Exported(
        output=output,
        form="expert-substitution" if constants else "dense",
        modules=sum(len(layer.modules) for layer in layout.layers),
        constants=sum(len(layer.numbers) for layer in fixed),
        parameters=sum(info.numel for info in found if info.dtype in FLOATING),
        nbytes=nbytes,
        compressed_bytes=source.nbytes,
        notes=layout.notes,
        difference=difference,
    )


def _checked(
    layout: Layout, place: Path, trust_remote_code: bool, progress: Progress
) -> Difference:
    """Measures the difference.

    Raises:
        UserError: It is more than rounding.
    """
    made = [TORCH_DTYPES[info.dtype] for layer in layout.layers for info in layer.made.values()]
    narrowest = max(set(made), key=lambda dtype: torch.finfo(dtype).eps)
    skipping = any(skips(module) for module in layout.term_modules())
    found = measure(layout.model, place, narrowest, skipping, trust_remote_code, progress)
    if not found.is_rounding:
        raise UserError(
            f"the dense form gives other logits than {layout.model.source.path} (the median of "
            f"{found.tokens} tokens is off by {found.median:.2g} of its logits, rounding explains "
            f"{found.allowed:.2g}); nothing was kept. Try --dtype float32; if it says so again, it "
            "is a bug: please report it with the model's type"
        )
    return found
