"""What becomes of tensors that transformers does not read with the model.

They are mostly layers for multi-token prediction. By default they are copied as they are, unless
config.json would then promise what they are not: where every layer loses equally many experts it
says fewer, and prediction layers that have experts are built by the same number. They are left out
of such a result, and config.json says of none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint import crowded, predictor_keys, size_of_tensors
from .removal import foreseen

if TYPE_CHECKING:
    from .plan import Plan, Size


def unread_left_out(plan: Plan, experts: int | None) -> tuple[str, ...]:
    """The unread tensors that a result does not get.

    Args:
        plan: The plan.
        experts: How many experts the result's config.json says, if fewer than the source's.

    Raises:
        RecipeError: They are to be kept, and config.json would not fit them.
    """
    unread, wish = plan.unread, plan.recipe.unread
    if wish == "drop":
        return unread.names
    gone = () if experts is None else crowded(plan.source, unread, experts)
    if gone and wish == "keep":
        raise plan.recipe.error(
            ("unread",),
            "the layers for multi-token prediction have experts as well, and would have more of "
            "them than config.json says once the other layers have fewer; write drop, or auto",
        )
    return gone


def check_unread(plan: Plan, sizes: Size | None) -> None:
    """Refuses to keep prediction layers that config.json may come to contradict.

    Args:
        plan: The plan.
        sizes: All sizes; None where they wait for data: only a run could tell, at its end.

    Raises:
        RecipeError: As `unread_left_out`.
    """
    if plan.recipe.unread == "keep" and plan.unread.routed:
        plan.left_out(foreseen(plan, sizes))


def unread_record(plan: Plan, experts: int | None) -> dict[str, Any] | None:
    """What the unread tensors are and what becomes of them, as JSON data; None: there are none.

    Args:
        plan: The plan.
        experts: How many experts its config.json says, if fewer than the source's.
    """
    if not plan.unread.names:
        return None
    gone = set(plan.left_out(experts))
    parts = {"multi-token prediction": plan.unread.predictors, "other": plan.unread.others}
    return {
        "parts": [
            {
                "what": what,
                "first": names[0],
                "kept": names[0] not in gone,
                **size_of_tensors(plan.source, names),
            }
            for what, names in parts.items()
            if names
        ],
        "config": [".".join(place) for place in predictor_keys(plan.source.config)]
        if gone.issuperset(plan.unread.predictors) and plan.unread.predictors
        else [],
    }


def unread_warnings(plan: Plan, experts: int | None) -> list[str]:
    """The same in words, a line for each part."""
    from ..report.tables import count, size

    record = unread_record(plan, experts)
    if record is None:
        return []
    lines = []
    for part in record["parts"]:
        what = "of multi-token prediction layers " * (part["what"] != "other")
        line = (
            f"{part['tensors']} tensors {what}({count(part['parameters'])} parameters, "
            f"{size(part['bytes'])}; {part['first']} ...) are not read by transformers with the "
            "model: "
        )
        if part["kept"]:
            how = "copied as they are" if plan.source.quantised is None else "kept, dequantised"
            lines.append(line + f"{how}, outside of every budget (unread: drop leaves them out)")
        elif plan.recipe.unread == "drop":
            lines.append(line + "left out, as the recipe says")
        else:
            lines.append(
                line + "left out, since their experts would be more than config.json says; "
                "they are kept where no experts are removed, or layers keep different numbers"
            )
        if record["config"] and part["what"] != "other":
            lines[-1] += f"; {', '.join(record['config'])} is set to 0"
    return lines
