"""The models of a comparison's file. Field descriptions are the reference of its keys.

Values are checked strictly, as in recipes; errors are placed at their key and line by `file`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..recipe import Calibration, Evaluate
from ..recipe.schema import Dtype
from .result import Budget


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _share(value: float) -> float:
    if not 0 < value < 1:
        meant = f"{value / 100:g}" if 1 <= value < 100 else "0.4"
        raise ValueError(f"{value} is no share; write it as {meant}")
    return value


Share = Annotated[float, AfterValidator(_share)]


class Budgets(_Model):
    """Several budgets of one definition."""

    remove: list[Share] | None = Field(None, min_length=1, description="shares to remove")
    keep: list[Share] | None = Field(None, min_length=1, description="shares to keep")
    of: Literal["model", "experts", "targets"] = Field("model", description="what they are of")
    unit: Literal["parameters", "bytes"] = Field("parameters", description="what is counted")

    @model_validator(mode="after")
    def _one_way(self) -> Budgets:
        if (self.remove is None) == (self.keep is None):
            raise ValueError("give exactly one of remove and keep, a list such as [0.2, 0.4]")
        if len(set(self.shares)) < len(self.shares):
            raise ValueError("the same share is given twice")
        return self

    @property
    def way(self) -> Literal["remove", "keep"]:
        """As which the shares are written."""
        return "keep" if self.remove is None else "remove"

    @property
    def shares(self) -> list[float]:
        """As written."""
        return self.remove or self.keep or []

    @property
    def each(self) -> list[Budget]:
        """One by one, as shares to remove."""
        removed = [share if self.remove else round(1 - share, 9) for share in self.shares]
        return [Budget(share, self.of, self.unit) for share in removed]


class RowEntry(_Model):
    """One method, or several in a row, at every budget."""

    name: str = Field("", description="by default the recipe's file, or its methods joined by +")
    label: str = Field("", description="what tables call it; by default its name")
    recipe: str | None = Field(None, description="a recipe whose steps and allocator are taken")
    steps: Any = Field(None, description="steps as in a recipe, where no recipe is named")
    allocate: Any = Field(None, description="as in a recipe; by default the comparison's")
    budgets: Budgets | Literal["none"] | None = Field(
        None,
        description="its own budgets; none (also where no step needs one): its steps say sizes",
    )
    unit: Literal["parameters", "bytes"] | None = Field(
        None,
        description="what its budgets count; by default the budgets' unit, and bytes where its "
        "terms are packed or sparse",
    )
    set: dict[str, Any] = Field(default={}, description="keys to change, as `--set` names them")

    @model_validator(mode="after")
    def _one_way(self) -> RowEntry:
        if (self.recipe is None) == (self.steps is None):
            raise ValueError("give exactly one of recipe and steps")
        if self.budgets == "none" and self.unit is not None:
            raise ValueError("unit has no effect without budgets")
        return self


class ComparisonFile(_Model):
    """A checked comparison; make one with `load_comparison`."""

    model: str = Field(
        min_length=1, description="a model directory, or a name on the hub: owner/name[@revision]"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    output: str = Field(
        description="directory to write, from the working directory; runs/<file> by default"
    )
    device: str = Field("auto", description="auto (cuda where there is one), cpu, cuda, mps")
    dtype: Dtype = Field("auto", description="of computation; auto: the checkpoint's")
    storage_dtype: Dtype = Field("auto", description="of what is written; auto: the checkpoint's")
    calibration: Calibration | None = Field(None, description="text that all methods see")
    seeds: list[int] = Field(
        default=[0], min_length=1, description="a calibration, and all rows, for each of them"
    )
    budgets: Budgets | None = Field(
        None, description="what rows may store; without, recipes keep their own"
    )
    allocate: Any = Field(None, description="as in a recipe, of rows that name no allocator")
    rows: list[RowEntry] = Field(min_length=1, description="what is compared, in order")
    evaluate: Evaluate | None = Field(None, description="what is measured on all rows")
    gate: bool = Field(True, description="check the written files against what was computed")

    @model_validator(mode="after")
    def _consistent(self) -> ComparisonFile:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: the same seed is given twice")
        return self
