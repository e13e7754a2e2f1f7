"""One method on tensors: for notebooks, tests of one's own, and trying an idea before a run.

    import mctk

    bank = mctk.apply("svd_llm", weight, size=64, inputs=x)       # weight [out, in], x [T, in]
    approximation, _ = bank.materialise(0)

The same hooks are called, on the same banks, as in a run; what a run measures on a model is here
summed over the inputs that are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .hookspecs import STAGES, Method
from .registry import Registry, load_plugins

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    from .recipe import Step
    from .statistics import LayerStatistics, Need
    from .terms import Bank

    Rows: TypeAlias = torch.Tensor | Sequence[torch.Tensor]

LONE = "linear"  # the name of a bank that is given as a bare tensor


def method(name: str, registry: Registry | None = None) -> Method:
    """Finds a method by its name, or by "stage/name" where several stages have one of that name.

    Args:
        name: As recipes write it.
        registry: Plugins; the installed ones by default.

    Raises:
        UserError: There is none, or more than one.
    """
    registry = load_plugins() if registry is None else registry
    stage, slash, own = name.rpartition("/")
    if slash:
        return registry.method(stage, own)
    found = [known for known in registry.methods() if known.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{known.stage}/{known.name}" for known in found)
        raise UserError(f"several methods are called '{name}'; write one of {names}")
    from .errors import nearest

    raise UserError(f"no method '{name}'{nearest(name, [m.name for m in registry.methods()])}")


def apply(
    name: str | Method,
    weights: torch.Tensor | Mapping[str, torch.Tensor],
    *,
    size: int | float | None = None,
    inputs: Rows | Mapping[str, Rows] | None = None,
    statistics: Mapping[Need, Any] | None = None,
    layer: int = 0,
    **options: Any,
) -> Any:
    """Applies one method to one bank, or to the banks of one layer.

    Args:
        name: The method's name, "stage/name", or the method itself.
        weights: A matrix [out, in], a bank of E members [E, out, in], or banks by name, such as
            {"experts.gate": ..., "experts.up": ..., "experts.down": ...}.
        size: The method's own setting (a rank, a number of experts), or a share of the parameters
            to keep, a float up to 1, of which the largest setting within it is taken.
        inputs: What enters, [T, in]: the same for all members, or one tensor [T_e, in] for each;
            by bank name where several banks are given. Second moments and channel sums are made of
            it.
        statistics: Values of needs that inputs do not give (Fisher, routing ...), by need.
        layer: The layer's number, for methods that ask.
        **options: The method's options.

    Returns:
        The bank of new terms if one tensor was given, else banks by name.

    Raises:
        UserError: An option, a size or a statistic is missing or wrong.
    """
    import torch

    from .engine.passes import apply_step
    from .terms import Bank, BankShape, Dense

    chosen = method(name) if isinstance(name, str) else name
    step = _step(chosen, options)
    if chosen.stage not in STAGES[1:]:
        raise UserError(f"{chosen.stage}/{chosen.name} works on budgets, not on tensors")
    alone = isinstance(weights, torch.Tensor)
    named = {LONE: weights} if isinstance(weights, torch.Tensor) else dict(weights)
    banks: dict[str, Bank] = {}
    for bank, weight in named.items():
        if weight.dim() not in (2, 3):
            raise UserError(f"{bank}: weights have shape [out, in] or [E, out, in]")
        stacked = weight if weight.dim() == 3 else weight[None]
        shape = BankShape(*stacked.shape)
        dense = Dense(shape, range(shape.members), stacked)
        banks[bank] = Bank(bank, layer, shape, [dense])
    given = inputs if isinstance(inputs, Mapping) else dict.fromkeys(banks, inputs)
    found = _statistics(step, banks, given, statistics or {}, layer)
    calls = [[bank] for bank in banks] if chosen.scope == "bank" else [list(banks)]
    result = dict(banks)
    for names in calls:
        setting = _setting(step, {bank: banks[bank] for bank in names}, size)
        made = apply_step(step, names, banks, banks, found, setting)
        for bank, terms in made.items():
            result[bank] = Bank(bank, layer, banks[bank].shape, list(terms))
    return result[LONE] if alone else result


def _step(chosen: Method, options: dict[str, Any]) -> Step:
    """The method as a recipe's step, its options checked as a recipe's are."""
    from .recipe import Step
    from .recipe.load import check_keys, validate
    from .recipe.source import RecipeSource

    source = RecipeSource(options)
    unknown = f"unknown option of {chosen.stage}/{chosen.name}"
    check_keys(source, source.data, chosen.Options, (), unknown)
    checked = validate(source, chosen.Options, source.data, ())
    return Step(method=chosen, options=checked, size=None)


def _setting(step: Step, banks: dict[str, Bank], size: int | float | None) -> int | None:
    """The method's own setting for what was asked."""
    chosen = step.method
    where = f"{chosen.stage}/{chosen.name}"
    if size is None:
        if chosen.takes_size is True:
            raise UserError(f"size: {where} needs one, e.g. size=0.5, the share to keep")
        return None
    if not chosen.takes_size:
        raise UserError(f"size: {where} takes none")
    if isinstance(size, int):
        return size
    if not 0 < size <= 1:
        raise UserError(f"size: {size} is neither a setting nor a share between 0 and 1")
    settings, costs = chosen.sizes(banks, step.options)
    allowed = size * sum(bank.shape.parameters for bank in banks.values())
    fitting = [i for i, cost in enumerate(costs) if cost <= allowed]
    if not fitting:
        raise UserError(f"size: {where} cannot keep as little as {size:g}; {min(costs)} is least")
    return settings[max(fitting, key=lambda i: costs[i])]


def _statistics(
    step: Step,
    banks: dict[str, Bank],
    inputs: Mapping[str, Rows | None],
    given: Mapping[Need, Any],
    layer: int,
) -> LayerStatistics:
    """What the method declares, given or summed over the inputs."""
    from .statistics import LayerStatistics

    values: dict[Need, Any] = {need.canonical(banks): value for need, value in given.items()}
    for name, bank in banks.items():
        for need in step.method.needs(bank.shape, name, step.options):
            key = need.canonical(banks)
            if key not in values:
                values[key] = _summed(key, banks, inputs, f"{step.stage}/{step.method.name}")
    return LayerStatistics(layer, values, banks)


def _summed(
    need: Need, banks: dict[str, Bank], inputs: Mapping[str, Rows | None], where: str
) -> Any:
    """A need's value over the rows that are given."""
    import torch

    from .statistics import ChannelEnergy, ChannelMagnitude, SecondMoment
    from .statistics.sums import EnergySum, MagnitudeSum, MomentSum, Sum

    name: str = getattr(need, "bank", "")
    rows = inputs.get(name) if name in banks else None
    weighted = isinstance(need, ChannelEnergy) and need.weighted
    if not isinstance(need, SecondMoment | ChannelEnergy | ChannelMagnitude) or weighted:
        raise UserError(f"statistics: {where} needs {need}; give it as statistics={{need: value}}")
    if rows is None:
        raise UserError(f"inputs: {where} needs {need}: give what enters {name}, [T, in]")
    bank = banks[name]
    device = bank.terms[0].device
    total: Sum
    if isinstance(need, SecondMoment):
        total = MomentSum(need, bank, device)
    else:
        total = (MagnitudeSum if isinstance(need, ChannelMagnitude) else EnergySum)(bank, device)
    members = range(bank.shape.members)
    listed = [rows] * len(members) if isinstance(rows, torch.Tensor) else list(rows)
    if len(listed) != len(members) or any(x.shape[-1] != bank.shape.in_features for x in listed):
        raise UserError(
            f"inputs: {name} takes [T, {bank.shape.in_features}], or {len(members)} of them"
        )
    for member, x in zip(members, listed, strict=True):
        flat = x.reshape(-1, x.shape[-1]).to(device)
        token = torch.arange(flat.shape[0], device=device)
        total.add(member, flat, token, flat.new_ones(flat.shape[0]))
    return total.value()
