"""What a run will do and cost, from config.json and headers alone.

The plan finds every mistake that can be found before weights are read, and predicts the result's
size: exactly where sizes do not depend on data, otherwise as a bound that says so. After
allocation it is restated with the actual sizes; the files that are written equal that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from ..checkpoint import (
    ModelSizes,
    Source,
    count,
    experts_per_token,
    open_source,
    original_terms,
)
from ..checkpoint.weights import TORCH_DTYPES
from ..errors import CheckpointError, UserError, nearest
from ..models import BankSite, bank_sites
from ..statistics import ExpertFrequency, LayerSamples, Need, SecondMoment
from ..sweep import StreamedModel
from ..terms import DENSE, Bias, SizeCurve, Term
from .budget import set_budget

if TYPE_CHECKING:
    from ..recipe import Recipe, Step
    from ..registry import Registry

Item = tuple[int, str]  # layer and bank
Size = dict[tuple[int, int, str], int | None]  # step, layer, bank → the method's setting
TRACE_TOKENS = 4096  # tokens of the kept sample on which each pass's error is measured
TOLERANCE = 0.005  # of the original: how far below its budget a run may end


@dataclass
class Plan:
    """One run, planned.

    Attributes:
        recipe: What was asked for.
        model: The skeleton, with its weight map.
        sites: Per layer, its banks.
        targets: Per step, layer → names of the banks that it works on.
        needs: Per layer, the canonical statistics to collect.
        curves: The size curves of all `auto` banks, without errors.
        budget: What the auto banks may cost in all, in the budget's unit; None without a budget.
        allowed: What the budget's scope may cost in all.
        scope: What it costs in the original.
        original: Sizes of the original.
        warnings: What the user should know.
    """

    recipe: Recipe
    model: StreamedModel
    sites: list[dict[str, BankSite]]
    targets: list[dict[int, list[str]]]
    needs: dict[int, list[Need]]
    curves: list[SizeCurve]
    budget: int | None
    allowed: int | None
    scope: int
    original: ModelSizes
    warnings: list[str] = field(default_factory=list)
    _dtypes: dict[tuple[int, str], torch.dtype] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The model's directory."""
        return self.model.source

    @property
    def needs_curves(self) -> bool:
        """Whether sizes depend on data: they are decided after the statistics are there."""
        allocate = self.recipe.allocate
        return bool(self.curves) and allocate is not None and allocate.method.needs_curves

    def solve(self, curves: list[SizeCurve] | None = None) -> Size:
        """Decides every step's size on every bank.

        Args:
            curves: The auto banks' curves with errors; None for an allocator that needs none.
        """
        chosen: dict[Item, int] = {}
        allocate = self.recipe.allocate
        if self.curves:
            assert allocate is not None and self.budget is not None
            known = curves or self.curves
            picked = allocate.method.allocate(known, self.budget, allocate.options)
            chosen = {curve.item: curve.settings[picked[curve.item]] for curve in known}
        sizes: Size = {}
        for number, step in enumerate(self.recipe.steps):
            for layer, banks in self.targets[number].items():
                for bank in banks:
                    sizes[number, layer, bank] = self.setting(step, layer, bank, chosen)
        if all(size == DENSE for size in sizes.values()):
            key = ("budget",) if self.recipe.budget else ("steps",)
            raise self.recipe.error(key, "nothing would change: every bank is kept as it is")
        return sizes

    def layout(self, sizes: Size) -> dict[int, dict[str, list[Term]]] | None:
        """The terms of every changed module on the meta device; None if data decide them.

        A module is changed if any of its banks is; its other banks are stored as they were.
        """
        changed: dict[int, dict[str, list[Term]]] = {}
        for number, step in enumerate(self.recipe.steps):
            for layer, names in self.targets[number].items():
                for bank in names:
                    size = sizes[number, layer, bank]
                    if size == DENSE:
                        continue
                    site = self.sites[layer][bank]
                    terms = step.method.layout(site.shape, size, step.options)
                    if terms is None:
                        return None
                    dtype = self.storage_dtype(layer, site)
                    new = [term.to(dtype=dtype) for term in terms]
                    now = changed.setdefault(layer, {})
                    before = now.get(bank) or self.original_terms(layer, site)
                    if step.stage != "compensate":  # that adds; all else replaces the weights
                        before = [t.to(dtype=dtype) for t in before if isinstance(t, Bias)]
                    now[bank] = [*new, *before]
        for layer, banks in changed.items():
            modules = {self.sites[layer][bank].module for bank in banks}
            for name, site in self.sites[layer].items():
                if site.module in modules and name not in banks:
                    banks[name] = self.original_terms(layer, site)
        return changed

    def source_dtype(self, layer: int, site: BankSite) -> torch.dtype:
        """The dtype in which the checkpoint stores a bank's weights."""
        key = (layer, site.module)
        if key not in self._dtypes:
            prefix = f"{self.model.layers_path}.{layer}.{site.module}."
            name = next(
                name
                for name in self.model.layer_tensors[layer]
                if any(t.startswith(prefix) for t in self.model.weights.targets[name])
            )
            self._dtypes[key] = TORCH_DTYPES[self.source.tensors[name].dtype]
        return self._dtypes[key]

    def storage_dtype(self, layer: int, site: BankSite) -> torch.dtype:
        """The dtype in which rewritten terms of a bank are stored."""
        name = self.recipe.storage_dtype
        return self.source_dtype(layer, site) if name == "auto" else getattr(torch, name)

    def original_terms(self, layer: int, site: BankSite) -> list[Term]:
        """A bank's terms in the original, on meta, in the checkpoint's dtype."""
        return original_terms(site, self.source_dtype(layer, site))

    def predict(self, sizes: Size) -> ModelSizes | None:
        """The result's sizes; None if data decide them."""
        changed = self.layout(sizes)
        return None if changed is None else count_model(self.model, changed)

    def attained(self, sizes: Mapping[str, int]) -> int:
        """What the budget's scope costs in a result, in the budget's unit.

        Args:
            sizes: The result's sizes by name, as `ModelSizes.as_dict` gives them.
        """
        assert self.recipe.budget is not None
        unit = self.recipe.budget.unit
        return self.scope - (self.original.as_dict()[unit] - sizes[unit])

    def setting(self, step: Step, layer: int, bank: str, chosen: Mapping[Item, int]) -> int | None:
        """A step's setting on one bank; `chosen` holds those of the auto banks."""
        size = step.size
        if size is None:
            return None
        if size.auto:
            return chosen[layer, bank]
        shape = self.sites[layer][bank].shape
        if size.rank is not None:
            if size.rank > min(shape.out_features, shape.in_features):
                raise self.recipe.error(
                    ("steps", self.recipe.steps.index(step), "size"),
                    f"rank {size.rank} exceeds {bank} of layer {layer}, a "
                    f"{shape.out_features} × {shape.in_features} matrix",
                )
            return size.rank
        assert size.keep is not None  # a size that is not auto has a rank or a share
        settings, costs = step.method.sizes(shape, step.options)
        allowed = size.keep * shape.parameters
        fitting = [s for s, c in zip(settings, costs, strict=True) if c <= allowed]
        if not fitting:
            raise self.recipe.error(
                ("steps", self.recipe.steps.index(step), "size"),
                f"keep {size.keep} of {bank} in layer {layer} is below its smallest size, "
                f"{costs[0] / shape.parameters:.3f}",
            )
        return fitting[-1]


def count_model(
    model: StreamedModel, changed: Mapping[int, Mapping[str, list[Term]]]
) -> ModelSizes:
    """Counts a streamed model whose changed modules hold these terms."""
    head = model.model.get_output_embeddings()
    head_macs = math.prod(head.weight.shape) if head is not None else 0
    return count(
        model.source,
        model.weights,
        model.layers,
        model.layers_path,
        experts_per_token(model.config),
        head_macs,
        changed,
    )


def make_plan(
    recipe: Recipe,
    registry: Registry,
    device: str = "cpu",
    model: StreamedModel | None = None,
    weights: bool = True,
) -> Plan:
    """Plans a run: reads config.json and headers, never weights.

    Args:
        recipe: What is asked for.
        registry: The plugins.
        device: Where it will compute.
        model: The recipe's model, where another run has opened it already.
        weights: Whether the weights will be read afterwards; if not, a hub model's weights are
            not downloaded.

    Raises:
        UserError: Whatever is wrong with the model, the targets, the sizes or the budget.
    """
    registry.register_kinds()
    if model is None:
        source = open_source(recipe.model, recipe.revision, weights)
        model = StreamedModel(source, device, recipe.dtype, recipe.trust_remote_code)
    if "quantization_config" in model.source.config:
        raise UserError(
            f"{model.source.path}: is compressed already; compress the original, or export it first"
        )
    sites = [bank_sites(layer) for layer in model.layers]
    _check_routing(model, sites)
    if recipe.propagate == "compressed":
        raise recipe.error(
            ("calibration", "propagate"),
            "statistics of the compressed model's activations are not supported yet; "
            "write propagate: original",
        )
    recipe.check_layers(len(sites))
    targets = [_targets(recipe, number, sites) for number in range(len(recipe.steps))]
    original = count_model(model, {})
    plan = Plan(recipe, model, sites, targets, {}, [], None, None, 0, original)
    plan.needs = _needs(plan)
    _check_fused(plan)
    set_budget(plan)
    _warn(plan)
    return plan


def _targets(recipe: Recipe, number: int, sites: list[dict[str, BankSite]]) -> dict[int, list[str]]:
    """The banks that a step works on, by layer."""
    step = recipe.steps[number]
    found: dict[int, list[str]] = {}
    for layer, banks in enumerate(sites):
        names = [name for name in banks if step.selects(layer, name)]
        if names:
            found[layer] = names
    known = {name for layer, banks in enumerate(sites) if layer in step.layers for name in banks}
    for glob in step.targets:
        if not any(fnmatchcase(name, glob) for name in known):
            raise recipe.error(
                ("steps", number, "targets"),
                f"no bank of the chosen layers matches {glob}{nearest(glob, known)}",
            )
    return found


def _check_routing(model: StreamedModel, sites: list[dict[str, BankSite]]) -> None:
    """A router cannot choose more experts than there are."""
    for layer, banks in enumerate(sites):
        experts = min((s.shape.members for s in banks.values() if s.part == "down"), default=None)
        if experts is not None and experts_per_token(model.config) > experts:
            raise CheckpointError(
                f"{model.source.path / 'config.json'}: {experts_per_token(model.config)} experts "
                f"per token, and layer {layer} has {experts}"
            )


def _needs(plan: Plan) -> dict[int, list[Need]]:
    """The union of what the steps need, by layer, in canonical form and stable order."""
    needs: dict[int, list[Need]] = {}
    for number, step in enumerate(plan.recipe.steps):
        for layer, banks in plan.targets[number].items():
            sites = plan.sites[layer]
            for bank in banks:
                for need in step.method.needs(sites[bank].shape, bank, step.options):
                    if isinstance(need, SecondMoment):
                        need = need.canonical(sites)
                    if need not in needs.setdefault(layer, []):
                        needs[layer].append(need)
    asked = sorted({type(n).__name__ for layer in needs.values() for n in layer})
    if asked and plan.recipe.calibration is None:
        raise plan.recipe.error((), f"calibration is missing; the steps need {', '.join(asked)}")
    if plan.recipe.calibration is not None:
        touched = {layer for step in plan.targets for layer in step}
        for layer in sorted(touched):
            wanted = needs.setdefault(layer, [])
            wanted.append(LayerSamples(TRACE_TOKENS))
            has_experts = any(site.part == "down" for site in plan.sites[layer].values())
            if has_experts and ExpertFrequency() not in wanted:
                wanted.append(ExpertFrequency())  # tokens per expert are part of every report
    return needs


def _check_fused(plan: Plan) -> None:
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
            raise UserError(
                f"steps: {inside[0]} and {other} are one tensor in the checkpoint ({name}); "
                "target both or neither"
            )


def _warn(plan: Plan) -> None:
    """Notes what is legal but surprising."""
    unread = plan.model.weights.unread
    if unread:
        plan.warnings.append(
            f"{len(unread)} tensors are not read by transformers ({unread[0]} ...): copied as is"
        )
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
        if not step.method.takes_size or step.size is None or step.size.rank is None:
            continue
        full = {
            bank
            for layer, banks in plan.targets[number].items()
            for bank in banks
            if _stores_no_less(plan, step, layer, bank)
        }
        if full:
            plan.warnings.append(
                f"steps.{number}: rank {step.size.rank} stores no less than the dense matrices of "
                f"{', '.join(sorted(full))}"
            )


def _stores_no_less(plan: Plan, step: Step, layer: int, bank: str) -> bool:
    shape = plan.sites[layer][bank].shape
    terms = step.method.layout(shape, step.size.rank, step.options) if step.size else None
    return terms is not None and sum(term.parameters() for term in terms) >= shape.parameters
