"""Where text comes from: local files, the datasets that papers use, or any dataset of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob, has_magic
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mctk.errors import UserError, nearest
from mctk.hub import HubError, split_revision

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Left out of a dump where they are as by default: hashes from before there were such keys hold.
_LATER = ("subset", "data_files", "column", "chat")


class TextError(UserError):
    """Text is missing, damaged or too little.

    Args:
        message: What is wrong and what to write instead.
        source: Where the text was to come from; a recipe knows the place of it.
        key: The key of the source that is to blame; "" for all of it.
    """

    def __init__(self, message: str, source: Source, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.message, self.source, self.key = message, source, key


@dataclass(frozen=True)
class Dataset:
    """A dataset that papers use, with their way of joining its rows."""

    path: str
    name: str | None
    column: str
    joiner: str
    joined: bool  # rows are pieces of one text, not documents
    files: dict[str, str] | None = None  # by split; only these are read
    revision: str | None = None
    evaluation_split: str = "test"
    evaluation_rows: int | None = None
    evaluation_windows: int | None = None


DATASETS = {
    "wikitext2": Dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n", True),
    # The hub's own loading script is no longer supported; its Parquet conversion is the same text.
    "ptb": Dataset(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        "sentence",
        " ",
        True,
        revision="refs/convert/parquet",
    ),
    "c4": Dataset(
        "allenai/c4",
        None,
        "text",
        " ",
        False,
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        evaluation_split="validation",
        evaluation_rows=1100,
        evaluation_windows=256,
    ),
}


class Source(BaseModel):
    """Where text comes from: local files, or a dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    text: list[str] | None = Field(
        None,
        min_length=1,
        description="globs: .txt (a document a file), .jsonl and .parquet (a document a row)",
    )
    dataset: str | None = Field(
        None,
        description="wikitext2, ptb or c4 as papers use them, or a dataset on the hub: "
        "owner/name[@revision]; needs the `datasets` library",
    )
    subset: str | None = Field(None, description="of a dataset on the hub: its configuration")
    data_files: list[str] | None = Field(
        None, min_length=1, description="of a dataset on the hub: these of its files only, globs"
    )
    split: str | None = Field(
        None, description="of a dataset; train to calibrate and test to evaluate by default"
    )
    column: str | None = Field(
        None, description="key of a row's text; text by default, with chat messages"
    )
    chat: bool = Field(
        False, description="rows are conversations: the tokenizer's chat template writes them out"
    )

    _root: Path | None = PrivateAttr(None)

    @field_validator(
        "text", "data_files", mode="before", json_schema_input_type=str | list[str] | None
    )
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> Source:
        ways = [way for way in ("text", "dataset", "mix") if way in type(self).model_fields]
        if sum(getattr(self, way) is not None for way in ways) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}")
        for key in ("split", "subset", "data_files"):
            if getattr(self, key) is not None and self.dataset is None:
                raise ValueError(f"{key} has no effect without dataset")
        for key in ("subset", "data_files", "column", "chat"):
            if getattr(self, key) and self.dataset in DATASETS:
                raise ValueError(f"{key} has no effect: {self.dataset} is read as papers do")
        for key in ("column", "chat"):
            if getattr(self, key) and self.text is None and self.dataset is None:
                raise ValueError(f"{key} has no effect beside mix; give it to each source")
        return self

    @field_validator("dataset")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None or value in DATASETS:
            return value
        try:
            name, _ = split_revision(value)
        except HubError:
            name = ""
        if "/" not in name:
            hint = nearest(value, DATASETS)
            raise ValueError(
                f"no dataset is called {value!r}{hint}; those on the hub are written owner/name"
            )
        return value

    @model_serializer(mode="wrap")
    def _without_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        return {k: v for k, v in written.items() if v or k not in _LATER}

    def model_post_init(self, context: Any) -> None:
        """Takes the recipe's directory from the validation context's "root"."""
        super().model_post_init(context)
        self._root = (context or {}).get("root")

    @property
    def label(self) -> str:
        """A short name: the dataset's, or for each glob its last part without wildcards."""
        if self.dataset is not None:
            return self.dataset.partition("@")[0]
        names = []
        for pattern in self.text or ():
            path = Path(pattern)
            plain = [part for part in (path.stem, *path.parts[-2::-1]) if not has_magic(part)]
            names.append(plain[0] if plain else pattern)
        return ",".join(dict.fromkeys(names))

    @property
    def key(self) -> str:
        """The key that says where rows come from."""
        return "text" if self.dataset is None else "dataset"

    def files(self) -> list[Path]:
        """Returns the text's files, sorted; a glob is taken beside the recipe if it matches there.

        Raises:
            TextError: If a glob matches nothing, or something that cannot be read as is asked.
        """
        found: set[Path] = set()
        for pattern in self.text or ():
            roots = [Path(), *([self._root] if self._root else [])][::-1]
            for root in roots:
                matches = glob(str(root / Path(pattern).expanduser()), recursive=True)
                matched = {Path(match) for match in matches if Path(match).is_file()}
                if matched:
                    break
            else:
                what = "no file matches" if has_magic(pattern) else "there is no file"
                places = " or ".join(dict.fromkeys(str(root.resolve()) for root in roots))
                raise TextError(f"{what} '{pattern}' in {places}", self, "text")
            found |= matched
        for file in sorted(found):
            if file.suffix not in SUFFIXES:
                raise TextError(f"{file} is neither {' nor '.join(SUFFIXES)}", self, "text")
            if file.suffix == ".parquet" and find_spec("pyarrow") is None:
                raise TextError(f"{file} needs pyarrow: pip install 'mctk[eval]'", self, "text")
            for key in ("chat", "column"):
                if file.suffix == ".txt" and getattr(self, key):
                    raise TextError(f"has no effect on {file}: it has no rows", self, key)
        return sorted(found)


class MixedSource(Source):
    """One of several sources."""

    weight: float = Field(1.0, gt=0, description="its share of the sequences, against the others'")
