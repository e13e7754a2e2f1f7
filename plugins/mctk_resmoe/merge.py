"""The merge: one barycenter expert a layer, and what is left of each expert in its order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk.decompose import base_and_residuals, own_matrices, part_of
from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.terms import Bank, Dense, Term
    from torch import Tensor

    from mctk_resmoe.barycenter import Barycenter


class WassersteinOptions(MethodOptions):
    """Options of `wasserstein`."""

    start: int | Literal["all"] = Field(
        default=0,
        description="the expert whose neurons the barycenter starts from, which decides the local "
        "optimum; all tries every expert and takes the best, E times the work",
    )
    iterations: int = Field(
        default=100, ge=1, le=100, description="at most so many; ordinary layers take 2 to 4"
    )
    tolerance: float = Field(
        default=1e-7,
        ge=0.0,
        description="stop once the support moves by less than this (a sum of squares)",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="assignments solved at once, on as many cores; each holds I² float64 numbers "
        "(1.6 GB for Mixtral)",
    )


class Wasserstein(Method):
    """Base: the experts' barycenter; residuals in its order of neurons. Exact, and without data.

    ResMoE's barycenter expert W_ω and residuals ``Δ_e = T_e W_e − W_ω`` (arXiv 2503.06881, fig. 2).
    """

    stage = "merge"
    name = "wasserstein"
    scope = "experts"
    summary = "One base, the experts' free-support Wasserstein barycenter, and residuals aligned."
    reference = "arXiv 2503.06881, fig. 2"
    Options = WassersteinOptions

    def layout(self, banks: Layer, size: int | None, options: WassersteinOptions) -> Terms:
        """One base and a residual for each expert; gate's and up's biases follow their neurons."""
        import torch

        experts = _check(banks, options)
        result: dict[str, list[Term]] = {}
        for name, bank in banks.items():
            out, into = bank.shape.out_features, bank.shape.in_features
            neurons = into if part_of(name) == "down" else out
            result[name] = base_and_residuals(
                bank,
                [0] * experts,
                torch.empty(1, out, into, device="meta"),
                torch.empty(experts, out, into, device="meta"),
                torch.empty(experts, neurons, dtype=torch.long, device="meta"),
            )
        return result

    def merge(
        self, layer: Layer, statistics: Any, size: int | None, options: WassersteinOptions
    ) -> Terms:
        """Splits every bank into the barycenter and the aligned residuals."""
        import torch

        from mctk_resmoe.barycenter import aligned

        _check(layer, options)
        experts = {part_of(name): _plain_matrices(bank).weight for name, bank in layer.items()}
        found = _barycenter(layer, experts, options)
        _tell(experts, found)
        result: dict[str, list[Term]] = {}
        for name, bank in layer.items():
            part = part_of(name)
            base, weight = found.support[part], experts[part]
            residual = torch.empty_like(weight, dtype=torch.float32)
            for e in range(weight.shape[0]):
                torch.sub(aligned(weight, part, found.order, e).float(), base, out=residual[e])
            slots = [0] * weight.shape[0]
            result[name] = base_and_residuals(bank, slots, base[None], residual, found.order)
        return result


def _barycenter(
    layer: Layer, experts: dict[str, Tensor], options: WassersteinOptions
) -> Barycenter:
    from mctk_resmoe.barycenter import barycenter, best_barycenter

    settings = (options.iterations, options.tolerance, options.workers)
    try:
        if options.start == "all":
            return best_barycenter(experts, *settings)
        return barycenter(experts, options.start, *settings)
    except ValueError as error:
        place = next(iter(layer.values())).layer
        raise UserError(f"merge/wasserstein in layer {place}: {error}") from error


def _tell(experts: dict[str, Tensor], found: Barycenter) -> None:
    """Says how the objective fell, beside the experts' own energy."""
    from mctk_resmoe.barycenter import squared

    energy = sum(squared(w[e].float()) for w in experts.values() for e in range(w.shape[0]))
    path = ", ".join(f"{value:.6g}" for value in found.objective)
    share = f" ({found.objective[-1] / energy:.1%} of the experts' energy)" if energy else ""
    note(f"barycenter from expert {found.start}: objective after each iteration {path}{share}")


def _plain_matrices(bank: Bank) -> Dense:
    """Returns the term with the experts' own matrices.

    Raises:
        UserError: Another step has rewritten or packed them.
    """
    from mctk.terms import Dense

    term = own_matrices(bank)
    if type(term) is Dense and term.unpacked() is term:
        return term
    raise UserError(
        f"{bank.name} of layer {bank.layer} was rewritten by a step before: merge comes first"
    )


def _check(layer: Layer, options: WassersteinOptions) -> int:
    """Returns the number of experts.

    Raises:
        UserError: They were rewritten before, there is only one, or `start` is none of them.
    """
    for bank in layer.values():
        _plain_matrices(bank)
    first = next(iter(layer.values()))
    experts = first.shape.members
    if experts < 2:
        raise UserError(f"layer {first.layer} has one expert: merge needs two")
    if options.start != "all" and not 0 <= options.start < experts:
        raise UserError(
            f"start: {options.start} in layer {first.layer}, whose experts are 0 to {experts - 1}; "
            "write one of them, or all"
        )
    return experts
