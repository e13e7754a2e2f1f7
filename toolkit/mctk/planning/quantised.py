"""Sizes of a source whose weights are stored quantised, beside those of a result that is not.

Steps start from the dequantised weights, and what they leave is written in that dtype: a result of
fewer parameters may take more bytes than its source. Bytes of the original are those that its files
hold, in every table and for every budget.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models import BankSite
    from .plan import Plan


def stored_share(plan: Plan, layer: int, site: BankSite) -> Fraction:
    """The bytes that a bank's module takes in the source, of those that it takes dequantised."""
    inside = f"{plan.model.layers_path}.{layer}.{site.module}."
    names = [
        name
        for name in plan.model.layer_tensors[layer]
        if any(target.startswith(inside) for target in plan.model.weights.targets[name])
    ]
    stored = sum(plan.source.stored_bytes(name) for name in names)
    return Fraction(stored, sum(plan.source.tensors[name].nbytes for name in names))


def quantised_record(plan: Plan) -> dict[str, Any] | None:
    """In which format the source stores weights, and its bytes; None: in none that is quantised."""
    quantised = plan.source.quantised
    if quantised is None:
        return None
    return {
        "format": quantised.label,
        "tensors": len(quantised.packed),
        "bytes": plan.source.nbytes,
        "dtype": quantised.dtype,
        "dequantised_bytes": sum(info.nbytes for info in plan.source.tensors.values()),
    }


def byte_warnings(plan: Plan, nbytes: int | None) -> list[str]:
    """What to know of the bytes of a result whose source is quantised.

    Args:
        plan: The plan.
        nbytes: The result's bytes; None where they are not known yet.
    """
    from ..report.tables import size

    record = quantised_record(plan)
    if record is None:
        return []
    lines = [
        f"the source stores its weights in {record['format']}, {size(record['bytes'])} in all; "
        f"they are dequantised, {size(record['dequantised_bytes'])} in {record['dtype']}, and what "
        "no step rewrites is written so"
    ]
    if nbytes is not None and nbytes > record["bytes"]:
        lines.append(
            f"the result, {size(nbytes)}, is larger than the source's {size(record['bytes'])} of "
            f"{record['format']}, though it has fewer parameters; quantise it again (a step "
            "quantize: rtn, or the serving engine's own), or budget bytes (budget.unit: bytes)"
        )
    return lines
