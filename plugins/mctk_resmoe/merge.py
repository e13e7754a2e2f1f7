"""The merge: one barycenter expert a layer, and what is left of each expert in its order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mctk.errors import UserError
from mctk.hookspecs import Method, MethodOptions
from mctk.notes import note
from pydantic import Field

if TYPE_CHECKING:
    from mctk.hookspecs import Layer, Terms
    from mctk.terms import Bank, Bias, Dense, Term
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
    """Base: the experts' barycenter; residuals in its order of neurons. Exact, and without data."""

    stage = "merge"
    name = "wasserstein"
    scope = "experts"
    summary = "One base, the experts' free-support Wasserstein barycenter, and residuals aligned."
    reference = "arXiv 2503.06881"
    Options = WassersteinOptions

    def layout(self, banks: Layer, size: int | None, options: WassersteinOptions) -> Terms:
        """One base and a residual for each expert; gate's and up's biases follow their neurons."""
        import torch

        experts = _check(banks, options)
        result: dict[str, list[Term]] = {}
        for name, bank in banks.items():
            out, into = bank.shape.out_features, bank.shape.in_features
            neurons = into if _part(name) == "down" else out
            result[name] = _split(
                bank,
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
        experts = {_part(name): own_matrices(bank).weight for name, bank in layer.items()}
        found = _barycenter(layer, experts, options)
        _tell(experts, found)
        result: dict[str, list[Term]] = {}
        for name, bank in layer.items():
            part = _part(name)
            base, weight = found.support[part], experts[part]
            residual = torch.empty_like(weight, dtype=torch.float32)
            for e in range(weight.shape[0]):
                torch.sub(aligned(weight, part, found.order, e).float(), base, out=residual[e])
            result[name] = _split(bank, base[None], residual, found.order)
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


def _part(name: str) -> str:
    """Gate, up or down for ``experts.gate`` ..."""
    return name.rsplit(".", 1)[-1]


def own_matrices(bank: Bank) -> Dense:
    """Returns the term with the experts' own matrices.

    Raises:
        UserError: Another step has rewritten them.
    """
    from mctk.terms import Bias, Dense

    rest = [term for term in bank.terms if not isinstance(term, Bias)]
    own = list(range(bank.shape.members))
    if len(rest) == 1 and type(rest[0]) is Dense and list(rest[0].slots) == own:
        term = rest[0]
        if term.rows is None and term.cols is None and term.unpacked() is term:
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
        own_matrices(bank)
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


def _split(bank: Bank, base: Tensor, residual: Tensor, order: Tensor) -> list[Term]:
    """Returns a bank as base and residuals, then its biases.

    Args:
        bank: As the merge found it.
        base: ``[1, out, in]``.
        residual: ``[E, out, in]``.
        order: The neurons' new order ``[E, I]``.
    """
    from mctk.terms import Bias, Dense

    members = bank.shape.members
    terms: list[Term] = [
        Dense(bank.shape, [0] * members, base),
        Dense(bank.shape, range(members), residual),
    ]
    for term in bank.terms:
        if isinstance(term, Bias):
            terms.append(term if _part(bank.name) == "down" else _reordered(term, order))
    return terms


def _reordered(term: Bias, order: Tensor) -> Bias:
    """Returns biases of gate or up in the new order, with a slot for each expert."""
    import torch
    from mctk.terms import Bias

    vectors = []
    for e in range(term.shape.members):
        vector = term.materialise(e)[1]
        assert vector is not None  # the original's: every expert has its own
        vectors.append(vector[order[e].to(vector.device)])
    return Bias(term.shape, range(term.shape.members), torch.stack(vectors))
