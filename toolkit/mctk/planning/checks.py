"""What a plan refuses or warns of beside targets, needs and budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoint import experts_per_token
from ..checkpoint.weights import TORCH_DTYPES
from ..errors import CheckpointError, UserError
from ..models import stated_groups
from .layout import DataDecide, apply_layout, banks_now, lay_out_layer

if TYPE_CHECKING:
    from ..models import BankSite
    from ..sweep import StreamedModel
    from .plan import Plan


def check_layers(model: StreamedModel) -> None:
    """A model whose layers cannot run one by one, each once and in order, is refused here.

    Raises:
        UserError: Says what its own forward does with its layers.
    """
    _ = model.wiring  # found out now


def check_routing(model: StreamedModel, sites: list[dict[str, BankSite]]) -> None:
    """A router cannot choose more experts than there are, nor among groups that do not come out.

    Raises:
        CheckpointError: config.json says what its model cannot compute.
    """
    k = experts_per_token(model.config)
    for layer, banks in enumerate(sites):
        down = next((site for site in banks.values() if site.part == "down"), None)
        if down is None:
            continue
        experts = down.shape.members
        where = f"{model.source.path / 'config.json'}: "
        if k > experts:
            raise CheckpointError(f"{where}{k} experts per token, and layer {layer} has {experts}")
        stated = stated_groups(model.layers[layer].get_submodule(down.module.rpartition(".")[0]))
        wrong = None if stated is None else _wrong_groups(*stated, experts, k)
        if wrong is not None:
            raise CheckpointError(f"{where}the router of layer {layer} has {wrong}")


def _wrong_groups(groups: int, chosen: int, experts: int, k: int) -> str | None:
    """Why a router could not choose by groups (n_group, topk_group), in words; None if it can."""
    if groups <= 1:
        return None
    if experts % groups:
        return f"{experts} experts in {groups} groups (n_group), which does not come out even"
    each = experts // groups
    if each == 1:
        return f"groups (n_group) of one expert each, and {experts} experts"
    if not 0 < chosen <= groups:
        return f"{groups} groups (n_group), of which a token cannot use {chosen} (topk_group)"
    if chosen * each < k:
        return (
            f"groups of {each} experts, of which a token uses {chosen} (topk_group): too few for "
            f"its {k} experts"
        )
    return None


def check_options(plan: Plan) -> None:
    """An option that is given by layer names layers that its step works on.

    Which options those are, their fields say: ``json_schema_extra={"keys": "layers"}``.
    """
    for number, step in enumerate(plan.recipe.steps):
        for name, field in type(step.options).model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or extra.get("keys") != "layers":
                continue
            for layer in getattr(step.options, name):
                if layer in plan.targets[number]:
                    continue
                last = len(plan.sites) - 1
                why = (
                    f"there is no layer {layer}; the last is {last}"
                    if layer > last
                    else f"has no effect: the step does not work on layer {layer}"
                )
                path = ("steps", number, "options", name, str(layer))
                raise plan.recipe.error(path, why)


def check_gradients(plan: Plan) -> None:
    """Gradients underflow in float16, and of data and model labels one kind a step is taken."""
    gradients = [n for needs in plan.needs.values() for n in needs if n.gradient]
    if gradients and plan.model.dtype == torch.float16:
        raise plan.recipe.error(
            ("dtype",),
            f"{type(gradients[0]).__name__} needs gradients, which underflow in float16; write "
            "bfloat16 or float32",
        )
    calibration = plan.recipe.calibration
    if not gradients and calibration is not None and calibration.keep_every is not None:
        raise plan.recipe.error(
            ("calibration", "keep_every"), "has no effect: no step needs gradients"
        )
    labels = {getattr(need, "labels", None) for need in gradients if need.transient}
    if len(labels) > 1:
        raise plan.recipe.error(
            ("steps",), "steps of one recipe ask for gradients with different labels; not supported"
        )


def check_fused(plan: Plan) -> None:
    """A source tensor may not feed a changed module and an unchanged one at once."""
    changed = {
        f"{plan.model.layers_path}.{layer}.{plan.sites[layer][bank].module}."
        for step in plan.targets
        for layer, banks in step.items()
        for bank in banks
    }
    prefixes = tuple(changed)
    for name, names in plan.model.weights.targets.items():
        inside = [target for target in names if target.startswith(prefixes)]
        if inside and len(inside) < len(names):
            other = next(t for t in names if not t.startswith(prefixes))
            if all(t in plan.model.side for t in names if t not in inside):
                _check_apart(plan, name)
                continue
            raise UserError(
                f"steps: {inside[0]} and {other} are one tensor in the checkpoint ({name}); "
                "target both or neither"
            )


def _check_apart(plan: Plan, name: str) -> None:
    """What is loaded together with a changed module is written apart, as the model holds it.

    Raises:
        RecipeError: In the dtype of computation it is not what the checkpoint has.
    """
    stored, computed = TORCH_DTYPES[plan.source.tensors[name].dtype], plan.model.dtype
    if torch.promote_types(stored, computed) != computed:
        raise plan.recipe.error(
            ("dtype",),
            f"{str(computed).removeprefix('torch.')} does not hold what {name} and others store; "
            "they are copied from memory: write auto or float32",
        )


def warn(plan: Plan) -> None:
    """Notes what is legal but surprising."""
    longest = getattr(plan.model.config.get_text_config(), "max_position_embeddings", None)
    evaluate = plan.recipe.evaluate
    lengths = [text.length for text in evaluate.perplexity] if evaluate is not None else []
    if plan.recipe.calibration is not None:
        lengths.append(plan.recipe.calibration.length)
    if isinstance(longest, int) and max(lengths, default=0) > longest:
        plan.warnings.append(
            f"sequences of {max(lengths)} tokens: the model was made for at most {longest}"
        )
    for number, step in enumerate(plan.recipe.steps):
        if step.stage != "decompose" or step.size is None or step.size.rank is None:
            continue
        full = {
            bank
            for layer, banks in plan.targets[number].items()
            for bank in banks
            if _stores_no_less(plan, number, layer, bank)
        }
        if full:
            plan.warnings.append(
                f"steps.{number}: rank {step.size.rank} stores no less than the dense matrices of "
                f"{', '.join(sorted(full))}"
            )


def _stores_no_less(plan: Plan, number: int, layer: int, bank: str) -> bool:
    """Whether a step's stated rank costs a bank as much as its matrices or more."""
    size = plan.recipe.steps[number].size
    assert size is not None
    try:
        before = lay_out_layer(plan, plan.sizes(), number, layer)
        after = {layer: dict(before.get(layer, {}))}
        apply_layout(plan, number, layer, [bank], size.rank, after)
    except DataDecide:
        return False
    now = banks_now(plan, layer, [bank], before)[bank].parameters()
    return sum(term.parameters() for term in after[layer][bank]) >= now
