"""One method on tensors: for notebooks, tests of one's own, and trying an idea before a run.

    import mctk

    bank = mctk.apply("svd_llm", weight, size=64, inputs=x)       # weight [out, in], x [T, in]
    approximation, _ = bank.materialise(0)

The same hooks are called, on the same banks in float32, as in a run; what a run measures on a model
is here summed over the inputs that are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from .errors import UserError, nearest
from .hookspecs import Method
from .registry import Registry, calling, load_plugins, place_of

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    from .recipe import Step
    from .statistics import LayerStatistics, Need
    from .statistics.sums import Sum
    from .terms import Bank

    Weights: TypeAlias = torch.Tensor | Bank
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
    for info in registry.plugins() if not found else ():
        if info.name == name and info.methods:
            raise UserError(f"'{name}' is a plugin; its methods are {', '.join(info.methods)}")
    if not found:
        known = {method.name for method in registry.methods()}
        broken = [f"plugin '{info.name}' is broken" for info in registry.plugins() if info.broken]
        raise UserError("; ".join([f"no method '{name}'{nearest(name, known)}", *broken]))
    if len(found) > 1:
        places = " or ".join(f"{method.stage}/{method.name}" for method in found)
        raise UserError(f"'{name}' is in several stages; write {places}")
    return found[0]


@overload
def apply(
    name: str | Method,
    weights: Weights,
    *,
    size: int | float | None = None,
    inputs: Rows | None = None,
    original: Weights | None = None,
    statistics: Mapping[Need, Any] | None = None,
    layer: int = 0,
    **options: Any,
) -> Bank: ...


@overload
def apply(
    name: str | Method,
    weights: Mapping[str, Weights],
    *,
    size: int | float | None = None,
    inputs: Mapping[str, Rows] | None = None,
    original: Mapping[str, Weights] | None = None,
    statistics: Mapping[Need, Any] | None = None,
    layer: int = 0,
    **options: Any,
) -> dict[str, Bank]: ...


def apply(
    name: str | Method,
    weights: Weights | Mapping[str, Weights],
    *,
    size: int | float | None = None,
    inputs: Rows | Mapping[str, Rows] | None = None,
    original: Weights | Mapping[str, Weights] | None = None,
    statistics: Mapping[Need, Any] | None = None,
    layer: int = 0,
    **options: Any,
) -> Bank | dict[str, Bank]:
    """Applies one method to one bank, or to the banks of one layer.

    Args:
        name: The method's name, "stage/name", or the method itself.
        weights: A matrix [out, in], a bank of E members [E, out, in], or what an earlier call
            returned. Where a method works on a layer: such by bank name, {"experts.gate": ...,
            "experts.up": ..., "experts.down": ...}.
        size: The method's own setting (a rank, a number of experts), an int; or a float up to 1,
            the share to keep, of which the largest setting within it is taken.
        inputs: What enters, [T, in]: the same for all members, or one tensor [T_e, in] for each;
            by bank name where weights are. Second moments, energies and magnitudes of channels are
            summed over it.
        original: What `weights` were before earlier calls, for methods that make up for what was
            lost (stages compensate and distill); by default `weights`.
        statistics: What inputs do not give (Fisher information, routing ...), by need: values as
            `mctk.statistics` describes them.
        layer: The layer's number, for methods that depend on it.
        **options: The method's options.

    Returns:
        The bank as the sum of its new terms, or banks by name where weights were given so.
        `bank.materialise(e)` is member e as (weight [out, in], bias [out] or None),
        `bank.apply(x, e)` its output, `bank.parameters()` what is stored.

    Raises:
        UserError: An option, a size or a statistic is missing or wrong, or the method failed.
    """
    from .engine.passes import apply_step
    from .terms import Bank

    chosen = method(name) if isinstance(name, str) else name
    if chosen.stage == "allocate":
        raise UserError(f"{chosen.stage}/{chosen.name} works on size curves, not on tensors")
    step = _step(chosen, options)
    alone = not isinstance(weights, Mapping)
    banks = _banks(weights, layer)
    before = banks if original is None else _banks(original, layer)
    if {key: bank.shape for key, bank in before.items()} != {k: b.shape for k, b in banks.items()}:
        raise UserError("original: has other banks or shapes than weights")
    given = inputs if isinstance(inputs, Mapping) else dict.fromkeys(banks, inputs)
    found = _statistics(step, banks, given, statistics or {}, layer)
    calls = [[bank] for bank in banks] if chosen.scope == "bank" else [list(banks)]
    result = dict(banks)
    for names in calls:
        setting = _setting(step, {bank: banks[bank] for bank in names}, size)
        for bank, terms in apply_step(step, names, banks, before, found, setting).items():
            result[bank] = Bank(bank, layer, banks[bank].shape, list(terms))
    return result[next(iter(result))] if alone else result


def _banks(weights: Weights | Mapping[str, Weights], layer: int) -> dict[str, Bank]:
    """Tensors as banks of one dense term in float32; banks as they are."""
    from .terms import Bank, BankShape, Dense

    if isinstance(weights, Bank):
        return {weights.name: weights}
    named = weights if isinstance(weights, Mapping) else {LONE: weights}
    if not named:
        raise UserError("weights: give at least one bank")
    banks: dict[str, Bank] = {}
    for name, weight in named.items():
        if isinstance(weight, Bank):
            banks[name] = weight
            continue
        if weight.dim() not in (2, 3):
            raise UserError(f"{name}: weights have shape [out, in] or [E, out, in]")
        stacked = (weight if weight.dim() == 3 else weight[None]).detach().float()
        shape = BankShape(*stacked.shape)
        banks[name] = Bank(name, layer, shape, [Dense(shape, range(shape.members), stacked)])
    return banks


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
        if size < 1:
            raise UserError(f"size: {size} is no setting; write 1 or more, or a share such as 0.5")
        return size
    if not 0 < size <= 1:
        raise UserError(
            f"size: {size} is no share between 0 and 1; a setting, as a rank, is an int"
        )
    if chosen.stage == "decompose":
        banks = {bank: value.without_biases() for bank, value in banks.items()}
    with calling(chosen, "sizes", place_of(banks)):
        settings, costs = chosen.sizes(banks, step.options)
    fitting = [i for i, cost in enumerate(costs) if cost <= size * costs[-1]]
    if not fitting:
        least = costs[0] / costs[-1]
        raise UserError(f"size: {where} keeps no less than {least:.3f} of {', '.join(banks)}")
    return settings[fitting[-1]]


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
        with calling(step.method, "needs", f"{name} of layer {layer}"):
            needs = step.method.needs(bank.shape, name, step.options)
        for need in needs:
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
    from .statistics.sums import EnergySum, MagnitudeSum, MomentSum

    name: str = getattr(need, "bank", "")
    weighted = isinstance(need, ChannelEnergy) and need.weighted
    if not isinstance(need, SecondMoment | ChannelEnergy | ChannelMagnitude) or weighted:
        raise UserError(f"statistics: {where} needs {need}; give it as statistics={{need: value}}")
    rows = inputs.get(name)
    if rows is None:
        raise UserError(f"inputs: {where} needs {need}: give what enters {name}, [T, in]")
    bank = banks[name]
    device = bank.terms[0].device
    total: Sum
    if isinstance(need, SecondMoment):
        total = MomentSum(need, bank, device)
    elif isinstance(need, ChannelMagnitude):
        total = MagnitudeSum(bank, device)
    else:
        total = EnergySum(bank, device)
    members = bank.shape.members
    listed = [rows] * members if isinstance(rows, torch.Tensor) else list(rows)
    if len(listed) != members or any(x.shape[-1] != bank.shape.in_features for x in listed):
        raise UserError(f"inputs: {name} takes [T, {bank.shape.in_features}], or {members} of them")
    for member, x in enumerate(listed):
        flat = x.detach().reshape(-1, x.shape[-1]).to(device)
        token = torch.arange(flat.shape[0], device=device)
        total.add(member, flat, token, flat.new_ones(flat.shape[0]))
    return total.value()
