"""What modules of terms have in common: owning the terms' tensors under flat names.

The names matter. transformers renames and fuses tensors of a checkpoint by patterns such as
`experts.gate_up_proj.` or `.gate.weight`; a name without inner dots below the module meets none of
them. And a module owns all that it reads, because accelerate brings offloaded tensors back just for
the forward of the module that holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, nearest
from ..terms import Bank, BankShape, Term, spec_elements

LINEAR = "linear"
"""The only part of a linear layer; its name is left out of tensor names."""


def tensor_name(part: str | None, index: int, key: str) -> str:
    """Returns a term's tensor name within its module, e.g. `terms_gate_0_U` or `terms_0_U`.

    Args:
        part: "gate", "up" or "down" of an experts module; None (or "linear") of a linear layer.
        index: The term's place in its bank.
        key: The tensor's name in the term.
    """
    middle = "" if part in (None, LINEAR) else f"{part}_"
    return f"terms_{middle}{index}_{key}"


class TermModule(nn.Module):
    """Owns the tensors of the terms of one or more banks.

    It is built from specs with all tensors on the meta device; they are filled by loading a
    checkpoint or by `set_terms`. Positions are buffers. All else is a parameter, the bytes of
    packed weights and of bitmaps too: accelerate offloads parameters, and buffers only if asked.

    Args:
        shapes: Part → shape of its bank.
        specs: Part → the specs of its terms, in order. The same parts.
        dtype: What floating tensors are loaded in.

    Raises:
        CheckpointError: Names the key that is missing, unknown or does not fit.
    """

    def __init__(
        self,
        shapes: Mapping[str, BankShape],
        specs: Mapping[str, Sequence[Mapping[str, Any]]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        for part in specs:
            if part not in shapes:
                raise CheckpointError(f"terms.{part}: unknown bank{nearest(part, shapes)}")
        for part in shapes:
            if part not in specs:
                raise CheckpointError(f"terms.{part}: is missing")
        self.shapes = dict(shapes)
        self.specs = {part: [dict(spec) for spec in specs[part]] for part in shapes}
        # Terms on meta: they hold what is not data, and `terms` puts the tensors in.
        self._templates = {
            part: [self._own(part, i, spec, dtype) for i, spec in enumerate(specs[part])]
            for part in shapes
        }

    def _own(self, part: str, index: int, spec: Mapping[str, Any], dtype: torch.dtype) -> Term:
        where = f"terms.{part}[{index}]"
        shape = self.shapes[part]
        for key, wanted in (
            ("members", shape.members),
            ("out", shape.out_features),
            ("in", shape.in_features),
        ):
            if spec.get(key) != wanted:
                raise CheckpointError(
                    f"{where}.{key}: is {spec.get(key)!r}, the model's module has {wanted}"
                )
        try:
            term = Term.from_spec(spec, meta_tensors(spec)).to(dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error
        for key, tensor in term.stored().items():
            name = tensor_name(part, index, key)
            if _is_data(tensor):
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)
        return term

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None without any."""
        floats = (p.dtype for p in self.parameters(recurse=False) if p.is_floating_point())
        return next(floats, None)

    def elements(self) -> dict[str, int]:
        """How many weights each tensor of the module holds."""
        return _elements(self.specs)

    def terms(self, part: str = LINEAR) -> list[Term]:
        """Returns a bank's terms around the tensors that the module holds now."""
        return [
            template.with_stored(
                {key: getattr(self, tensor_name(part, i, key)) for key in template.stored()}
            )
            for i, template in enumerate(self._templates[part])
        ]

    def bank(self, part: str = LINEAR) -> Bank:
        """Returns a part of the module as a bank (which does not know its layer)."""
        return Bank(part, -1, self.shapes[part], self.terms(part))

    def set_terms(self, part: str, terms: Sequence[Term]) -> None:
        """Puts in the tensors of terms that have the specs that the module was built from."""
        templates = self._templates[part]
        if len(terms) != len(templates):
            raise ValueError(f"{part}: has {len(templates)} terms, not {len(terms)}")
        for i, (template, term) in enumerate(zip(templates, terms, strict=True)):
            if term.to(template.dtype).spec() != template.spec():
                raise ValueError(f"{part}: term {i} is {term.spec()}, not {template.spec()}")
            for key, tensor in term.stored().items():
                name = tensor_name(part, i, key)
                if _is_data(tensor):
                    tensor = nn.Parameter(tensor.detach(), requires_grad=False)
                setattr(self, name, tensor)

    def check(self) -> None:
        """Checks the values of loaded index tensors; offloaded terms are passed over.

        Raises:
            CheckpointError: Names the term and the tensor.
        """
        for part, specs in self.specs.items():
            for i, (spec, term) in enumerate(zip(specs, self.terms(part), strict=True)):
                stored = term.stored()
                if any(t.is_meta for t in stored.values()):
                    continue
                try:
                    Term.from_spec(spec, stored)
                except CheckpointError as error:
                    raise CheckpointError(f"terms.{part}[{i}]: {error}") from error

    def extra_repr(self) -> str:
        """One word per term, as in `gate: dense + lowrank`."""
        return ", ".join(
            f"{part}: {' + '.join(str(spec['kind']) for spec in specs) or 'nothing'}"
            for part, specs in self.specs.items()
        )


def _is_data(tensor: Tensor) -> bool:
    """Whether a stored tensor is weights or bytes, and not positions."""
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def tensor_elements(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many weights each tensor of swapped modules holds, by its name in a checkpoint.

    Args:
        modules: As a checkpoint's config.json describes them, see `swap`.
    """
    found: dict[str, int] = {}
    for path, entry in modules.items():
        banks = {LINEAR: entry["terms"]} if entry["type"] == LINEAR else entry["terms"]
        found |= {f"{path}.{name}": count for name, count in _elements(banks).items()}
    return found


def _elements(banks: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    return {
        tensor_name(part, i, key): count
        for part, specs in banks.items()
        for i, spec in enumerate(specs)
        for key, count in spec_elements(spec).items()
    }


def meta_tensors(spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a spec describes, without data."""
    tensors = {}
    entries = spec.get("tensors")
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"tensors: must map names to shape and dtype, not {entries!r}")
    for key, entry in entries.items():
        if not str(key).isidentifier():
            raise CheckpointError(f"tensors.{key}: is not a name")
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"tensors.{key}: must have shape and dtype, not {entry!r}")
        dtype = getattr(torch, str(entry.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"tensors.{key}.dtype: unknown dtype {entry.get('dtype')!r}")
        try:
            tensors[key] = torch.empty(entry.get("shape"), dtype=dtype, device="meta")
        except (TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"tensors.{key}.shape: {entry.get('shape')!r} is no shape"
            ) from error
    return tensors
