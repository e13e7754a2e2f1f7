"""The models of a recipe. Field descriptions are the reference of its keys.

Values are checked strictly: text is no number and `true` is no 1. Errors raised here are placed at
their key and line by `mctk.recipe.load`.
"""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from mctk.data import MixedSource, Source, shares
from mctk.errors import RecipeError
from mctk.hookspecs import Method, MethodOptions
from mctk.recipe.layers import Layers
from mctk.recipe.published import shortened
from mctk.recipe.source import KeyPath, RecipeSource

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Propagate = Literal["original", "compressed"]
Unread = Literal["auto", "keep", "drop"]


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )


class Size(_Model):
    """What a step stores per bank; neither of the two means `auto`: the budget decides."""

    keep: float | None = Field(None, gt=0, le=1, description="share of each bank's parameters")
    rank: int | None = Field(None, ge=1, description="the method's own setting, e.g. a rank")

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, value: Any) -> Any:
        if value == "auto":
            return {}
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError("write auto, {keep: 0.6} or {rank: 128}")
        return value

    @property
    def auto(self) -> bool:
        """Whether the allocator chooses."""
        return self.keep is None and self.rank is None


class Budget(_Model):
    """What the run may store."""

    remove: float | None = Field(None, gt=0, lt=1, description="share to remove")
    keep: float | None = Field(None, gt=0, lt=1, description="share to keep")
    of: Literal["model", "experts", "targets"] = Field("model", description="what the share is of")
    unit: Literal["parameters", "bytes"] = Field("parameters", description="what is counted")

    @model_validator(mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError(f"write {{remove: {value}}} or {{keep: {value}}}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Budget:
        if (self.remove is None) == (self.keep is None):
            raise ValueError("give exactly one of remove and keep")
        return self

    @property
    def kept(self) -> float:
        """The share that may stay, between 0 and 1."""
        return self.keep if self.keep is not None else 1 - (self.remove or 0)


class Calibration(Source):
    """Text that methods see, drawn as sequences of equal length."""

    mix: list[MixedSource] | None = Field(
        None, min_length=1, description="several sources, each with a weight (equal by default)"
    )
    sequences: int = Field(256, ge=1, description="how many sequences are drawn")
    length: int = Field(2048, ge=2, description="tokens of a sequence")
    batch: int = Field(1, ge=1, description="sequences in a forward pass")
    keep_every: int | None = Field(
        None,
        ge=1,
        description="for methods that need gradients: keep on disk what enters every so many "
        "layers, and compute the rest again; by default every layer, or as few as the disk asks",
    )
    propagate: Propagate | None = Field(
        None,
        description="whether later layers see the original's or the compressed layers' outputs; "
        "by default what the steps' methods declare",
    )

    @model_validator(mode="after")
    def _no_part_in_vain(self) -> Calibration:
        parts = self.mix or []
        for number, count in enumerate(shares([part.weight for part in parts], self.sequences)):
            if count == 0:
                raise ValueError(
                    f"mix.{number} ({parts[number].label}) gets none of the {self.sequences} "
                    "sequences by its weight: ask for more, raise its weight, or leave it out"
                )
        return self

    @property
    def source(self) -> Source | list[MixedSource]:
        """What `mctk.data.calibration_windows` draws from."""
        return self if self.mix is None else self.mix


class Allocate(_Model):
    """The method that shares the budget out; in a recipe `{method: name, options: {...}}`."""

    method: Method = Field(description="an allocate method")
    options: SerializeAsAny[MethodOptions] = Field(description="the method's options")


def _targets(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Step(_Model):
    """A method at work on some banks; in a recipe its first key is `<stage>: <method>`."""

    method: Method
    targets: Annotated[
        list[str], BeforeValidator(_targets, json_schema_input_type=str | list[str])
    ] = Field(default=["experts.*"], min_length=1, description="globs over bank names")
    layers: Annotated[
        Layers,
        BeforeValidator(Layers.parse, json_schema_input_type=int | str | list[int | str]),
        PlainSerializer(lambda layers: str(layers)),
    ] = Field(default=Layers(), description="all, 3, [0, 1] or 0-3,5")
    size: Size | None = Field(
        None, description="auto (where a method takes a size), {keep: ...}, {rank: ...}"
    )
    options: SerializeAsAny[MethodOptions] = Field(description="the method's options")

    @field_validator("targets")
    @classmethod
    def _globs(cls, value: list[str]) -> list[str]:
        for glob in value:
            if not re.fullmatch(r"[\w.*?\[\]-]+", glob):
                raise ValueError(
                    f"{glob!r} is no glob over bank names, such as experts.* or mlp.up"
                )
        return value

    @property
    def stage(self) -> str:
        """The method's stage."""
        return self.method.stage

    @property
    def auto(self) -> bool:
        """Whether the allocator chooses the step's size."""
        return self.size is not None and self.size.auto

    def selects(self, layer: int, bank: str) -> bool:
        """Whether the step works on a bank."""
        return layer in self.layers and any(fnmatchcase(bank, glob) for glob in self.targets)


class PerplexityText(Source):
    """A text whose perplexity is measured, over windows that do not overlap."""

    name: str = Field("", description="its name in tables; by default the dataset's or file's")
    length: int = Field(2048, ge=2, description="tokens of a window")
    windows: int | None = Field(None, ge=1, description="at most so many windows; all by default")

    @model_validator(mode="after")
    def _named(self) -> PerplexityText:
        if not self.name:
            object.__setattr__(self, "name", self.label)
        return self


def _switch(value: Any) -> Any:
    return {} if value is True else None if value is False else value


class Divergence(_Model):
    """How far next-token distributions are from the original's, on the perplexity texts."""

    tokens: int = Field(
        16384, ge=1, description="at most so many positions, of all texts alike from their starts"
    )


class Speed(_Model):
    """Tokens per second; whatever else the machine does counts."""

    batch: int = Field(1, ge=1, description="sequences at a time")
    length: int = Field(512, ge=1, description="tokens of a prompt")
    new: int = Field(64, ge=0, description="tokens that are generated after it")
    repeats: int = Field(5, ge=1, description="measurements, of which the median counts")


class Evaluate(_Model):
    """What is measured on the written checkpoint, and on the original."""

    perplexity: list[PerplexityText] = Field(default=[], description="texts")
    divergence: Annotated[
        Divergence | None, BeforeValidator(_switch, json_schema_input_type=Divergence | bool | None)
    ] = Field(
        default=None,
        description="KL divergence from the original and agreement with it; true is enough",
    )
    speed: Annotated[
        Speed | None, BeforeValidator(_switch, json_schema_input_type=Speed | bool | None)
    ] = Field(default=None, description="tokens per second; true is enough")
    tasks: list[str] = Field(default=[], description="lm-eval tasks")
    limit: int | None = Field(None, ge=1, description="documents of each task; all by default")

    @model_validator(mode="after")
    def _consistent(self) -> Evaluate:
        names = [text.name for text in self.perplexity]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two perplexity texts are named {name!r}; give each a name")
        if self.divergence is not None and not self.perplexity:
            raise ValueError("divergence is measured on the perplexity texts, and there are none")
        if self.limit is not None and not self.tasks:
            raise ValueError("limit has no effect without tasks; for perplexity set windows")
        return self


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value):
        raise ValueError(f"{value!r} is no device; write auto, cpu, cuda, cuda:0 or mps")
    return value


class Recipe(_Model):
    """A checked recipe; make one with `mctk.recipe.load_recipe`."""

    model: str = Field(
        min_length=1, description="a model directory, or a name on the hub: owner/name[@revision]"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    output: Annotated[
        Path, BeforeValidator(lambda value: _path(value), json_schema_input_type=str)
    ] = Field(
        description="directory to write, from the working directory; runs/<recipe> by default"
    )
    seed: int = Field(0, ge=0, description="salts everything drawn")
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto (cuda where there is one), cpu, cuda, cuda:0, mps"
    )
    dtype: Dtype = Field("auto", description="of computation; auto: the checkpoint's")
    storage_dtype: Dtype = Field("auto", description="of what is written; auto: the checkpoint's")
    calibration: Calibration | None = Field(None, description="text that methods see")
    budget: Budget | None = Field(None, description="what the run may store")
    allocate: Allocate | None = Field(None, description="how the budget is shared out")
    unread: Unread = Field(
        "auto",
        description="tensors that transformers does not read with the model, as for multi-token "
        "prediction: keep, drop; auto keeps them where config.json stays true of them",
    )
    steps: list[Step] = Field(min_length=1, description="methods, in the order of their work")
    evaluate: Evaluate | None = Field(None, description="what is measured afterwards")
    gate: bool = Field(True, description="check the written files against what was computed")

    _source: RecipeSource = PrivateAttr()
    _hub: bool = PrivateAttr(False)

    @property
    def file(self) -> Path | None:
        """The file the recipe came from, if any."""
        return self._source.file

    @property
    def propagate(self) -> Propagate:
        """Which outputs later layers see: as calibration says, else as a step's method declares."""
        if self.calibration is not None and self.calibration.propagate is not None:
            return self.calibration.propagate
        sequential = any(step.method.propagate == "compressed" for step in self.steps)
        return "compressed" if sequential else "original"

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """Returns an error at a key's line, e.g. at ("steps", 0, "layers")."""
        return self._source.error(path, message)

    def yaml(self) -> str:
        """Returns the recipe as written, with the command line's changes applied."""
        return self._source.yaml()

    def published(self) -> str:
        """Returns the recipe for others to read: without this machine's paths."""
        return self._source.published()

    @property
    def model_name(self) -> str:
        """What to call the model in reports: its name on the hub, or of a directory its own."""
        if self._hub:
            return self.model
        return shortened(self._source.data["model"], self._source.root)

    def on_hub(self, name: str, revision: str | None) -> Recipe:
        """Returns the recipe with its model on the hub, at a branch, tag or commit."""
        found = self.model_copy(update={"model": name, "revision": revision})
        found._hub = True
        return found

    @property
    def from_hub(self) -> bool:
        """Whether the model comes from the hub, and not from a directory."""
        return self._hub

    def canonical(self) -> dict[str, Any]:
        """Returns what decides the checkpoint's content, as JSON data, for hashing.

        Left out: output, device, gate, evaluate, the calibration's batch and keep_every (where and
        how a run computes, not what), unread at its default, and the text of files (its digest
        belongs to the token windows), a hub model's revision (the contents of its files count, and
        stand beside this). Paths are as written, so that a project may be moved.
        Methods appear with their versions.
        """
        data = self.model_dump(
            mode="json",
            exclude={"output", "device", "gate", "evaluate", "allocate", "steps"},
        )
        data["model"] = self.model if self._hub else self._source.data["model"]
        data["revision"] = None
        if self.unread == "auto":
            data.pop("unread")  # so that runs from before there was the key go on
        if self.calibration is not None:
            for key in ("batch", "keep_every"):
                data["calibration"].pop(key)
            data["calibration"]["propagate"] = self.propagate
        data["allocate"] = None if self.allocate is None else _canonical(self.allocate)
        data["steps"] = [_canonical(step) for step in self.steps]
        return data

    def fingerprint(self) -> str:
        """Returns the SHA-256 of `canonical()` in hexadecimal."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def check_layers(self, count: int) -> None:
        """Refuses a step that names layers which a model of `count` layers has not."""
        for index, step in enumerate(self.steps):
            last = max((last for _, last in step.layers.ranges or ()), default=0)
            if last >= count:
                raise self.error(
                    ("steps", index, "layers"),
                    f"there is no layer {last}; the last is {count - 1}",
                )


def _path(value: Any) -> Any:
    return Path(value).expanduser() if isinstance(value, str) else value


def _canonical(part: Allocate | Step) -> dict[str, Any]:
    method = part.method
    data = part.model_dump(mode="json", exclude={"method"})
    return {"method": f"{method.stage}/{method.name}", "version": method.version, **data}
