"""What a plugin, which an entry point of group ``mctk`` names, implements: `Plugin` and `Method`.

Hooks of `Plugin` carry `@hookimpl`; `MCTK_SPEC = 1` beside them names a `SPEC`. No torch at import.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pluggy
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from mctk.statistics import Need
    from mctk.terms import Bank, BankShape, SizeCurve, Term

    Item = tuple[int, int, str]  # step, layer, bank (of a layer scope: its banks, joined by +)
    Layer = Mapping[str, Bank]  # the targeted banks of one layer by name; one bank if scope says so
    Terms = Mapping[str, list[Term]]  # by bank name; a bank left out stays as it is

hookspec, hookimpl = pluggy.HookspecMarker("mctk"), pluggy.HookimplMarker("mctk")
STAGES = ("allocate", "merge", "decompose", "prune", "compensate", "quantize", "distill")
SPEC, OLDEST = 1, 1  # version of these hooks, and the oldest that a plugin may be written for


class MethodOptions(BaseModel):
    """Base of every method's options; a field's description is its help, its docs and its error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method:
    """One implementation of one stage; hooks return new terms and never change their arguments."""

    stage: ClassVar[str]  # one of STAGES; also the name of the hook that does the work
    name: ClassVar[str]  # as recipes write it
    origin: Any = None  # set when it is loaded: the `PluginInfo` of the plugin that brought it
    version: ClassVar[int] = 1  # raised whenever the method's numbers change; shown in tables
    summary: ClassVar[str]  # one line
    reference: ClassVar[str] = ""  # paper or URL
    Options: ClassVar[type[MethodOptions]] = MethodOptions
    scope: ClassVar[Literal["bank", "layer", "experts"]] = "bank"  # a call's; experts: all banks
    takes_size: ClassVar[bool | Literal["optional"]] = False  # needs `sizes`; `curve` if in errors
    units: ClassVar[Literal["squared_error", "score"]] = "squared_error"  # of `curve`
    propagate: ClassVar[Literal["original", "compressed"]] = "original"  # the paper's calibration
    same_size: ClassVar[bool] = False  # one setting for all layers, e.g. how many experts stay
    needs_curves: ClassVar[bool] = False  # an allocator that reads curves, of its `units`

    @hookspec
    def needs(self, shape: BankShape, bank: str, options: Any) -> list[Need]:
        """Returns what `statistics` will map to values for a targeted bank, such as "mlp.up"."""
        return []

    @hookspec
    def sizes(self, banks: Layer, options: Any) -> tuple[list[int], list[int]]:
        """Returns settings (DENSE: no change, last) and parameters, of what the step rewrites."""

    @hookspec
    def layout(self, banks: Layer, size: int | None, options: Any) -> Terms | None:
        """Returns `banks` on meta as they will be stored, for plans; None if data decide that."""

    @hookspec
    def curve(self, banks: Layer, statistics: Any, options: Any) -> list[float]:
        """Returns the banks' squared output error (or a score) per size, over tokens, falling."""

    @hookspec
    def decompose(self, bank: Bank, statistics: Any, size: int | None, options: Any) -> list[Term]:
        """Returns terms that replace the bank's (members x [out, in]), low rank of setting size."""

    @hookspec
    def allocate(self, curves: list[SizeCurve], budget: int, options: Any) -> dict[Item, int]:
        """Returns for each curve's item an index into its settings; the costs' sum <= budget."""

    @hookspec
    def merge(self, layer: Layer, statistics: Any, size: int | None, options: Any) -> Terms:
        """Returns shared and residual terms, or groups; `size`: an even share of the budget."""

    @hookspec
    def prune(self, layer: Layer, statistics: Any, size: int | None, options: Any) -> Terms:
        """Returns terms with fewer members (slot None), channels or entries."""

    @hookspec
    def compensate(
        self, layer: Layer, original: Layer, statistics: Any, size: int | None, options: Any
    ) -> Terms:
        """Returns terms to *add*, fitted to what `layer` has lost against `original`."""

    @hookspec
    def quantize(self, layer: Layer, statistics: Any, size: int | None, options: Any) -> Terms:
        """Returns the same terms stored in fewer bits."""

    @hookspec
    def distill(self, layer: Layer, original: Layer, statistics: Any, options: Any) -> Terms:
        """Returns the same terms with trained values."""


class Plugin:
    """Hooks of the plugin itself; all optional, and all called on every plugin."""

    @hookspec
    def methods(self) -> list[Method]:
        """Returns one instance of every method that the plugin brings."""

    @hookspec
    def kinds(self) -> list[type[Term]]:
        """Returns new kinds of term; a checkpoint that holds one names the plugin and needs it."""

    @hookspec
    def run_started(self, run: Any) -> None:
        """Called once when a run starts."""

    @hookspec
    def layer_done(self, run: Any, layer: int) -> None:
        """Called when a layer's compressed shard is written and recorded."""

    @hookspec
    def table_columns(self, run: Any) -> Mapping[str, str]:
        """Returns columns to add to the run's row in tables: heading to text."""
