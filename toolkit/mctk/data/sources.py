"""Where text comes from: local files, or the datasets that papers use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from mctk.errors import UserError, nearest


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
    """Where text comes from: local files, or a named dataset."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    text: list[str] | None = Field(
        None, min_length=1, description=".txt (a document a file) or .jsonl ({text: ...}) globs"
    )
    dataset: Literal["wikitext2", "ptb", "c4"] | None = Field(
        None, description="a named dataset, loaded with the `datasets` library"
    )
    split: str | None = Field(
        None, description="of a dataset; train to calibrate and test to evaluate by default"
    )

    _root: Path | None = PrivateAttr(None)

    @field_validator("text", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way(self) -> Source:
        ways = [way for way in ("text", "dataset", "mix") if way in type(self).model_fields]
        if sum(getattr(self, way) is not None for way in ways) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}")
        if self.split is not None and self.dataset is None:
            raise ValueError("split has no effect without dataset")
        return self

    def model_post_init(self, context: Any) -> None:
        """Takes the recipe's directory from the validation context's "root"."""
        super().model_post_init(context)
        self._root = (context or {}).get("root")

    @property
    def label(self) -> str:
        """A short name: the dataset's, or for each glob its last part without wildcards."""
        if self.dataset is not None:
            return self.dataset
        names = []
        for pattern in self.text or ():
            path = Path(pattern)
            plain = [part for part in (path.stem, *path.parts[-2::-1]) if not has_magic(part)]
            names.append(plain[0] if plain else pattern)
        return ",".join(dict.fromkeys(names))

    def files(self) -> list[Path]:
        """Returns the text's files, sorted; a glob is taken beside the recipe if it matches there.

        Raises:
            TextError: If a glob matches nothing, or something that is neither .txt nor .jsonl.
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
            if file.suffix not in (".txt", ".jsonl"):
                raise TextError(f"{file} is neither .txt nor .jsonl", self, "text")
        return sorted(found)


class MixedSource(Source):
    """One of several sources."""

    weight: float = Field(1.0, gt=0, description="its share of the sequences, against the others'")


def load_documents(source: Source, split: str = "train") -> Iterator[str]:
    """Yields the documents of a source, blank ones left out, one file or line in memory at a time.

    Args:
        source: What to read.
        split: Split of a dataset where the source names none.

    Raises:
        TextError: For files that are missing or damaged and datasets that cannot be loaded.
    """
    if source.dataset is None:
        for file in source.files():
            yield from _read(file, source)
        return
    dataset = DATASETS[source.dataset]
    rows = (row[dataset.column] for row in _load_dataset(source, source.split or split))
    if dataset.joined:
        yield dataset.joiner.join(rows)
    else:
        yield from (row for row in rows if row.strip())


def _read(file: Path, source: Source) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            if file.suffix == ".txt":
                documents: Iterable[str] = [stream.read()]
            else:
                documents = _lines(file, stream, source)
            yield from (text for text in documents if text.strip())
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8: {error.reason}", source, "text") from error
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}", source, "text") from error


def _lines(file: Path, stream: Iterable[str], source: Source) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{file}:{number}: not JSON: {error.msg}"
            raise TextError(problem, source, "text") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            problem = f'{file}:{number}: not an object with a string "text"'
            raise TextError(problem, source, "text")
        yield row["text"]


def _load_dataset(source: Source, split: str) -> Iterable[dict[str, Any]]:
    name = source.dataset
    assert name is not None
    try:
        import datasets
    except ImportError as error:
        problem = f"{name} needs the datasets library: pip install 'mctk[eval]'; or give text"
        raise TextError(problem, source, "dataset") from error
    dataset = DATASETS[name]
    if dataset.files is not None and split not in dataset.files:
        problem = f"{name} has no split '{split}'{nearest(split, dataset.files)}"
        raise TextError(problem, source, "dataset")
    files = None if dataset.files is None else {split: dataset.files[split]}
    try:
        return datasets.load_dataset(
            dataset.path, dataset.name, data_files=files, split=split, revision=dataset.revision
        )
    except Exception as error:  # the library raises many kinds: offline, no split, a full disk
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = (
            f"{name} (split {split}) cannot be loaded: {reason}; it needs the network once "
            "(HF_HUB_OFFLINE forbids it), or give local text"
        )
        raise TextError(problem, source, "dataset") from error
