"""The error trace: what each pass does to the outputs, measured alike for every method.

Measured on a kept sample of the layer's own calibration inputs, with the original's layers before
it: the relative squared error of the layer's output (over the energy of what the layer adds to the
residual stream), and of each bank's output on the inputs that it gets in the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..models import BankSite, installed, neighbours
from ..planning import TRACE_TOKENS
from ..runtime import observe
from ..statistics import LayerPassed, LayerSamples, LayerStatistics
from ..sweep import LayerCall, Passed, StreamedModel
from ..terms import Bank, Term, removed_members

UNCHANGED = 1e-4  # relative squared error that rounding may leave, in bfloat16 too


class LayerOriginal:
    """What a layer does in the original to a sample of its inputs: measured once for all runs.

    Args:
        model: The streamed model; the layer is filled.
        index: The layer's number.
        module: The layer.
        sites: Its bank sites.
        banks: Its original banks.
        samples: What enters it, n sequences (`kept_samples`).
        call: What else the layer is passed for these sequences.

    Attributes:
        inputs: What enters each bank: bank → member → rows [n, in], in pieces.
        outputs: The layer's outputs [n, T, H].
        energy: The squared norm of what it adds to the residual stream.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        module: nn.Module,
        sites: dict[str, BankSite],
        banks: dict[str, Bank],
        samples: Passed,
        call: LayerCall,
    ) -> None:
        self.model, self.index, self.module = model, index, module
        self.sites, self.banks = sites, banks
        self.samples, self.call = samples, call
        self.energies: dict[str, float] = {}  # of each bank's outputs, once known
        self.inputs: dict[str, dict[int, list[torch.Tensor]]] = {}
        self.outputs = self._run(listen=True)
        self.energy = _squared_distance(self.outputs, samples.hidden.to(self.outputs.device))

    def _run(self, listen: bool = False) -> torch.Tensor:
        with contextlib.ExitStack() as stack, torch.no_grad():
            if listen:
                self._listen(stack)
            entering = self.samples.to(self.model.device)
            return self.model.run_layer(self.index, entering, self.call).hidden

    def _listen(self, stack: contextlib.ExitStack) -> None:
        """Records what enters every bank of the original layer, until the stack unwinds."""
        modules = dict(self.module.named_modules())
        for path in {site.module for site in self.sites.values() if site.part != "linear"}:
            stack.enter_context(observe(modules[path], self._expert_tap()))
        for name, site in self.sites.items():
            if site.part == "linear":
                handle = modules[site.module].register_forward_pre_hook(self._linear_tap(name))
                stack.callback(handle.remove)

    def _linear_tap(self, name: str) -> Callable[..., None]:
        def tap(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            self.inputs.setdefault(name, {}).setdefault(0, []).append(rows)

        return tap

    def _expert_tap(self) -> Callable[..., None]:
        def tap(expert: int, token: Any, slot: Any, x: Any, h: Any, y: Any, weights: Any) -> None:
            for name, site in self.sites.items():
                if site.part in ("gate", "up", "down"):
                    rows = h if site.part == "down" else x
                    self.inputs.setdefault(name, {}).setdefault(expert, []).append(rows)

        return tap

    def layer_error(self, banks: dict[str, Bank]) -> float:
        """Relative squared error of the layer's output with these banks in place.

        Args:
            banks: All banks of each module that is to be replaced.
        """
        with installed(self.module, banks, self.model.dtype):
            error = _squared_distance(self._run(), self.outputs)
        return error / self.energy if self.energy else 0.0

    def bank_error(self, bank: Bank) -> float | None:
        """Relative squared error of a bank's output; None if no token reached it."""
        original = self.banks[bank.name]
        terms: list[Term] = [term.to(dtype=torch.float32) for term in bank.terms]
        bank = Bank(bank.name, bank.layer, bank.shape, terms)
        known = self.energies.get(bank.name)
        error = energy = 0.0
        for member, pieces in self.inputs.get(bank.name, {}).items():
            x = torch.cat(pieces).float()
            exact = _in_float32(original, member)
            ours = _in_float32(bank, member)
            # One product with the difference instead of one for every term.
            lost = functional.linear(x, exact[0] - ours[0], exact[1] - ours[1])
            error += float(lost.square().sum(dtype=torch.float64))
            if known is None:
                energy += float(functional.linear(x, *exact).square().sum(dtype=torch.float64))
        known = self.energies.setdefault(bank.name, energy)
        return error / known if known else None

    def whole_modules(self, banks: dict[str, Bank], names: set[str]) -> dict[str, Bank]:
        """All banks of every module that holds one of the named."""
        return {name: banks[name] for name in neighbours(self.sites, names)}


def kept_samples(statistics: LayerStatistics) -> Passed:
    """What enters a layer in the original, of the first sequences."""
    more = statistics.get(LayerPassed(TRACE_TOKENS), {})
    return Passed(statistics[LayerSamples(TRACE_TOKENS)], more)


class LayerTrace:
    """One run's passes on one layer, measured.

    Args:
        original: The layer in the original.

    Attributes:
        rows: For each pass and bank, the errors.
        moved: Banks whose members no longer correspond to the original's.
    """

    def __init__(self, original: LayerOriginal) -> None:
        self.original = original
        self.rows: list[dict[str, Any]] = []
        self.moved: set[str] = set()

    def after(self, step: str, names: list[str], banks: dict[str, Bank]) -> None:
        """Adds the rows of one pass; `banks` are all of the layer's as they are now."""
        original = self.original
        changed = {n for n in banks if banks[n] is not original.banks[n]}
        error = original.layer_error(original.whole_modules(banks, changed))
        gone = removed_members(banks.values())
        for name in names:
            # Where experts are removed tokens go to others: no bank's output answers to another's.
            apart = bool(gone) and original.sites[name].part != "linear"
            known = name not in self.moved and not apart
            bank_error = original.bank_error(banks[name]) if known else None
            merged = step.startswith("merge/")
            if merged and bank_error is not None and error < UNCHANGED < bank_error:
                # The layer gives what it gave, the bank does not: its neurons have changed places.
                self.moved.add(name)
                bank_error = None
            self.rows.append(
                {"step": step, "bank": name, "bank_error": bank_error, "layer_error": error}
            )


def _squared_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """``‖a - b‖²`` of hidden states [n, T, H], in float64, a sequence at a time."""
    pairs = zip(a, b, strict=True)
    return sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)


def _in_float32(bank: Bank, member: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A member's matrix [out, in] and bias [out]; zeros where it has none."""
    weight, bias = bank.materialise(member)
    shape, device = bank.shape, bank.terms[0].device if bank.terms else None
    if weight is None:
        weight = torch.zeros(shape.out_features, shape.in_features, device=device)
    if bias is None:
        bias = torch.zeros(shape.out_features, device=device)
    return weight.float(), bias.float()
