"""Documents of a source, one after the other: rows of files or datasets, or whole text files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mctk.data.chat import check_template, conversation, written_out
from mctk.data.sources import DATASETS, Source, TextError
from mctk.errors import brief, nearest
from mctk.hub import split_revision

TEXT = "text"
# What a conversation may be read from; only these columns of a file are.
CHAT_COLUMNS = ("messages", "prompt", "response", "completion")


def load_documents(source: Source, split: str = "train", tokenizer: Any = None) -> Iterator[str]:
    """Yields the documents of a source, blank ones left out, one file or row in memory at a time.

    Args:
        source: What to read.
        split: Split of a dataset where the source names none.
        tokenizer: Whose chat template writes conversations out; for other text it is not needed.

    Raises:
        TextError: For files or rows that are missing or damaged, datasets that cannot be loaded,
            and conversations that the template refuses.
    """
    if source.chat:
        check_template(tokenizer, source)
    if source.dataset in DATASETS:
        dataset = DATASETS[source.dataset]
        texts = (row[dataset.column] for row in _load_named(source, source.split or split))
        if dataset.joined:
            yield dataset.joiner.join(texts)
        else:
            yield from (text for text in texts if text.strip())
        return
    for place, row in _rows(source, split):
        if source.chat:
            messages = conversation(row, source, place)
            text = written_out(tokenizer, messages, source, place)
        else:
            text = _text_of(row, source, place)
        if text.strip():
            yield text


def _text_of(row: Any, source: Source, place: str) -> str:
    column = source.column or TEXT
    if isinstance(row, dict) and column in row:
        if row[column] is None:  # as good as blank
            return ""
        if isinstance(row[column], str):
            return str(row[column])
    problem = f'{place}: not an object with a string "{column}"'
    if isinstance(row, dict) and column not in row:
        problem += f"; it has {', '.join(map(str, row)) or 'nothing'}: name one by column"
    raise TextError(problem, source, source.key)


def _rows(source: Source, split: str) -> Iterator[tuple[str, Any]]:
    """Yields rows with their places; a .txt file is one row."""
    if source.dataset is not None:
        split = source.split or split
        for number, row in enumerate(_load_dataset(source, split), 1):
            yield f"{source.dataset} (split {split}): row {number}", row
        return
    for file in source.files():
        if file.suffix == ".parquet":
            yield from _parquet(file, source)
        else:
            yield from _text_file(file, source)


def _text_file(file: Path, source: Source) -> Iterator[tuple[str, Any]]:
    try:
        with file.open(encoding="utf-8") as stream:
            if file.suffix == ".txt":
                yield str(file), {TEXT: stream.read()}
                return
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    problem = f"{file}:{number}: not JSON: {error.msg}"
                    raise TextError(problem, source, "text") from error
                yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8: {error.reason}", source, "text") from error
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}", source, "text") from error


def _parquet(file: Path, source: Source) -> Iterator[tuple[str, Any]]:
    """Rows of a Parquet file, some at a time, of the columns that are needed."""
    import pyarrow
    from pyarrow import parquet

    wanted = CHAT_COLUMNS if source.chat else (TEXT,)
    if source.column is not None:
        wanted = (source.column,)
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            there = list(opened.schema_arrow.names)
            columns = [name for name in there if name in wanted]
            if not columns:
                problem = f"{file}: no column '{wanted[0]}'{nearest(wanted[0], there)}"
                raise TextError(f"{problem}; name one by column", source, "text")
            for batch in opened.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(
            f"{file}: cannot be read as Parquet: {brief(error)}", source, "text"
        ) from error


def _load_named(source: Source, split: str) -> Iterable[dict[str, Any]]:
    """Rows of one of the datasets that papers use."""
    dataset = DATASETS[source.dataset or ""]
    if dataset.files is not None and split not in dataset.files:
        problem = f"{source.dataset} has no split '{split}'{nearest(split, dataset.files)}"
        raise TextError(problem, source, "dataset")
    files = None if dataset.files is None else {split: dataset.files[split]}
    return _load(source, split, dataset.path, dataset.name, files, dataset.revision)


def _load_dataset(source: Source, split: str) -> Iterable[dict[str, Any]]:
    """Rows of any dataset on the hub."""
    name, revision = split_revision(source.dataset or "")
    part = split.partition("[")[0]  # train of train[:1000]
    files = None if source.data_files is None else {part: source.data_files}
    return _load(source, split, name, source.subset, files, revision)


def _load(
    source: Source, split: str, path: str, subset: str | None, files: Any, revision: str | None
) -> Iterable[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        problem = (
            f"{source.dataset} needs the datasets library: pip install 'mctk[eval]'; or give text"
        )
        raise TextError(problem, source, "dataset") from error
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(
            path, subset, data_files=files, split=split, revision=revision
        )
    except Exception as error:  # the library raises many kinds: offline, no split, a full disk
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = (
            f"{source.dataset} (split {split}) cannot be loaded: {reason}; it needs the network "
            "once (HF_HUB_OFFLINE forbids it), or give local text"
        )
        raise TextError(problem, source, "dataset") from error
    return rows
