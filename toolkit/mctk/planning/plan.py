"""What a run will do and cost, from config.json and headers alone.

The plan finds every mistake that can be found before weights are read, and predicts the result's
size: exactly where sizes do not depend on data, otherwise as a bound that says so. After
allocation it is restated with the actual sizes; the files that are written equal that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import (
    ModelSizes,
    Source,
    Unread,
    open_source,
    original_terms,
)
from ..checkpoint.weights import TORCH_DTYPES
from ..errors import UserError
from ..hub import HubError
from ..models import BankSite, bank_sites
from ..recipe import check_texts
from ..registry import calling, place_of
from ..statistics import Need
from ..sweep import StreamedModel
from ..terms import DENSE, Bank, SizeCurve, Term
from .bounds import beside
from .budget import merged_curves, set_budget
from .checks import (
    check_fused,
    check_gradients,
    check_layers,
    check_options,
    check_routing,
    warn,
)
from .counting import count_model
from .layout import (
    DataDecide,
    MetaTerms,
    groups,
    lay_out,
    lay_out_layer,
    step_banks,
    with_neighbours,
)
from .needs import find_needs, find_targets
from .removal import check_removal, experts_left, uniform
from .stated import stated
from .unread import check_unread, unread_left_out

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..registry import Registry

Item = tuple[int, int, str]  # step, layer and banks (joined by "+" where one call takes several)
Size = dict[tuple[int, int, str], int | None]  # step, layer, bank → the method's setting


@dataclass
class Plan:
    """One run, planned.

    Attributes:
        recipe: What was asked for.
        model: The skeleton, with its weight map.
        sites: Per layer, its banks.
        targets: Per step, layer → names of the banks that it works on.
        needs: Per layer, the canonical statistics to collect with the original's layers before it.
        recollected: Per layer, those to collect on what the run's compressed layers pass on.
        curves: The size curves of all `auto` banks, without errors.
        budget: What the auto banks may cost in all, in the budget's unit; None without a budget.
        allowed: What the budget's scope may cost in all.
        reachable: What it costs at the steps' largest sizes, if that is less than allowed.
        share: What an even split of it leaves the auto steps' banks of their parameters.
        scope: What it costs in the original, in bytes as they are stored.
        outside: What the result stores beside the scope and the unread tensors, in that unit.
        original: Sizes of the original, as it is stored.
        plain: What transformers reads of it, dequantised: what the steps start from.
        unread: The tensors that it does not read; they are outside of every scope.
        prepared: How many steps, from the first, are run before others' statistics are taken.
        prepared_terms: What those steps have made, on meta, once they have been run.
        warnings: What the user should know.
        configs: Number of experts that stay → the config.json that says so, once it is known.
        common: Step → the stated setting that it takes in all layers, once it is known.
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
    plain: ModelSizes
    unread: Unread
    outside: int = 0
    reachable: int | None = None
    share: float | None = None
    prepared: int = 0
    prepared_terms: MetaTerms | None = None
    recollected: dict[int, list[Need]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    configs: dict[int, dict[str, Any]] = field(default_factory=dict)
    common: dict[int, int] = field(default_factory=dict)
    _dtypes: dict[tuple[int, str], torch.dtype] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The model's directory."""
        return self.model.source

    @property
    def needs_curves(self) -> bool:
        """Whether sizes depend on data: they are decided after the statistics are there."""
        allocate = self.recipe.allocate
        auto = any(step.auto for step in self.recipe.steps)
        return auto and allocate is not None and allocate.method.needs_curves

    @property
    def pending(self) -> bool:
        """Whether the auto banks' curves wait for what the prepared steps make of the layers."""
        return self.budget is None and any(step.auto for step in self.recipe.steps)

    def groups(self, number: int, layer: int) -> list[list[str]]:
        """The banks of a layer that one call of a step's method gets: one, or all it targets."""
        return groups(self, number, layer)

    def step_banks(self, number: int, banks: Mapping[str, Bank]) -> dict[str, Bank]:
        """The banks as a step's hooks get them: `decompose` is spared the biases."""
        return step_banks(self, number, banks)

    def settle(self, prepared: MetaTerms) -> None:
        """Takes up what the prepared steps have made: curves and sizes follow from it.

        Args:
            prepared: Layer → bank → terms, on meta, of the banks that they rewrote.

        Raises:
            RecipeError: The budget cannot be met with them.
        """
        self.prepared_terms = {
            layer: {
                name: [
                    term.to(dtype=self.storage_dtype(layer, self.sites[layer][name]))
                    for term in terms
                ]
                for name, terms in banks.items()
            }
            for layer, banks in prepared.items()
        }
        self.common.clear()
        if self.pending:
            set_budget(self)
            check_removal(self, self.smallest())

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
            merged = merged_curves(self, known)
            with calling(allocate.method, "allocate"):
                picked = allocate.method.allocate(merged, self.budget, allocate.options)
                chosen = {curve.item: curve.settings[picked[curve.item]] for curve in merged}
            chosen = self._everywhere(chosen)
        sizes = self.sizes(chosen)
        if all(size == DENSE for size in sizes.values()):
            key = ("budget",) if self.recipe.budget else ("steps",)
            raise self.recipe.error(key, "nothing would change: every bank is kept as it is")
        return sizes

    def _everywhere(self, chosen: Mapping[Item, int]) -> dict[Item, int]:
        """Gives the setting of a step that takes the same size in all layers to each of them."""
        common = {
            item[0]: setting
            for item, setting in chosen.items()
            if self.recipe.steps[item[0]].method.same_size
        }
        return {
            curve.item: common[curve.item[0]] if curve.item[0] in common else chosen[curve.item]
            for curve in self.curves
        }

    def smallest(self) -> Size:
        """Every step's size on every bank if the auto steps store as little as they can."""
        items = merged_curves(self, self.curves)
        return self.sizes(self._everywhere({curve.item: curve.settings[0] for curve in items}))

    def sizes(self, chosen: Mapping[Item, int] | None = None) -> Size:
        """Every step's size on every bank.

        Args:
            chosen: The settings of the auto items; by default they change nothing.
        """
        found: Size = {}
        for number in range(len(self.recipe.steps)):
            for layer in self.targets[number]:
                found |= self._step_sizes(number, layer, chosen)
        return found

    def _step_sizes(self, number: int, layer: int, chosen: Mapping[Item, int] | None) -> Size:
        """One step's sizes in one layer; see `sizes`."""
        found: Size = {}
        for names in self.groups(number, layer):
            size: int | None = DENSE
            if not self.recipe.steps[number].auto:
                size = self.setting(number, layer, names)
            elif chosen is not None:
                size = chosen[number, layer, "+".join(names)]
            found |= {(number, layer, name): size for name in names}
        return found

    def layout(self, sizes: Size) -> MetaTerms | None:
        """The terms of every changed module on the meta device; None if data decide them."""
        try:
            return with_neighbours(self, lay_out(self, sizes))
        except DataDecide:
            return None

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
        return None if changed is None else self.count(changed)

    def count(self, changed: MetaTerms) -> ModelSizes:
        """The sizes of a result with these terms."""
        return count_model(self.model, changed, self.left_out(self.said(changed)))

    def said(self, changed: MetaTerms) -> int | None:
        """How many experts the config.json of a result with these terms says, if fewer."""
        return uniform(self, experts_left(self, changed))

    def left_out(self, experts: int | None) -> tuple[str, ...]:
        """The unread tensors that a result does not get whose config.json says so many experts."""
        return unread_left_out(self, experts)

    def attained(self, sizes: Mapping[str, int], left: Mapping[int, int] | None = None) -> int:
        """What the budget's scope costs in a result, in the budget's unit.

        Args:
            sizes: The result's sizes by name, as `ModelSizes.as_dict` gives them.
            left: How many experts each layer keeps, of the layers that lose some.
        """
        assert self.recipe.budget is not None
        return sizes[self.recipe.budget.unit] - beside(self, left or {})

    def in_scope(self, changed: MetaTerms) -> int:
        """What the budget's scope costs in a result with these terms."""
        return self.attained(self.count(changed).as_dict(), experts_left(self, changed))

    def setting(self, number: int, layer: int, names: list[str]) -> int | None:
        """A step's setting on some banks, where the recipe states it.

        Raises:
            RecipeError: The banks have no such size.
        """
        return stated(self, number, layer, names)

    def stated_before(self, number: int, layer: int) -> Size:
        """The sizes of a layer's steps before one, as far as the recipe states them."""
        fixed: Size = {}
        for earlier in range(number):
            fixed |= self._step_sizes(earlier, layer, None)
        return fixed

    def costs(self, number: int, banks: Mapping[str, Bank]) -> tuple[list[int], list[int]]:
        """A step's settings, and their parameters, on banks as the steps before it leave them."""
        step = self.recipe.steps[number]
        given = self.step_banks(number, banks)
        with calling(step.method, "sizes", place_of(given)):
            try:
                settings, costs = step.method.sizes(given, step.options)
            except UserError as error:
                raise self.recipe.error(("steps", number), str(error)) from error
            if not settings or settings[-1] != DENSE or len(settings) != len(costs):
                raise ValueError(
                    f"settings {settings} with costs {costs}: there must be as many of both, and "
                    "DENSE must be the last"
                )
            if any(low > high for low, high in pairwise(costs[:-1])):
                raise ValueError(f"costs {costs} fall: settings must ascend")
        return settings, costs

    def reads_size(self, number: int, layer: int, sizes: Size) -> bool:
        """Whether what a step makes of a layer depends on its size: data and size decide both.

        Args:
            number: The step.
            layer: The layer.
            sizes: All sizes, as `sizes` gives them.
        """
        try:
            lay_out_layer(self, sizes, number + 1, layer)
        except DataDecide:
            return True
        return self.recipe.steps[number].size is not None

    def passes_over(self, number: int, size: int | None) -> bool:
        """Whether a step leaves banks alone at a size.

        A method that sees a whole layer is called even where nothing is to be stored less: it may
        have more to say, such as which channels to skip at run time.
        """
        method = self.recipe.steps[number].method
        return size == DENSE and (method.scope == "bank" or method.same_size)

    def group_of(self, number: int, layer: int, bank: str) -> list[str]:
        """The banks that one call of a step's method gets together with this one."""
        return next(names for names in self.groups(number, layer) if bank in names)


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
    registry.register_kinds([step.method for step in recipe.steps])
    check_texts(recipe)
    if model is None:
        try:
            source = open_source(recipe.model, recipe.revision, weights)
        except HubError as error:
            raise recipe.error(("model",), str(error).removeprefix("model: ")) from error
        model = StreamedModel(source, device, recipe.dtype, recipe.trust_remote_code)
    if "quantization_config" in model.source.config:
        raise UserError(f"{model.source.path}: is compressed already; compress the original")
    sites = [bank_sites(layer) for layer in model.layers]
    check_layers(model)
    check_routing(model, sites)
    recipe.check_layers(len(sites))
    targets = [find_targets(recipe, number, sites) for number in range(len(recipe.steps))]
    original = count_model(model, {}, stored=True)
    unread = model.unread
    plain = count_model(model, {}, unread.names)
    plan = Plan(recipe, model, sites, targets, {}, [], None, None, 0, original, plain, unread)
    check_options(plan)
    find_needs(plan)
    check_gradients(plan)
    check_fused(plan)
    set_budget(plan)
    sizes = None if plan.pending or plan.needs_curves else plan.solve()
    if not plan.pending:
        check_removal(plan, plan.smallest() if sizes is None else sizes)
    check_unread(plan, sizes)
    warn(plan)
    return plan
