"""Text to token windows: calibration sequences drawn by hash, evaluation windows in order.

How calibration sequences are drawn, so that they stay when a corpus grows:

1. Every document has a key, a hash of (seed, its text). Documents are taken in the order of their
   keys, equal ones once, until they hold `POOL` times the tokens asked for. So neither the order of
   files and lines matters, nor does all of a large corpus have to be tokenised.
2. In that order they are bundled. Whether a bundle ends after a document depends on this document
   alone (its key against its length), so that bundles hold `BUNDLE` windows on average and a
   document of that length or more stands alone. A bundle's documents are joined by the end-of-text
   token (conversations by nothing: their template ends them) and cut into windows; its tail is
   dropped.
3. Every window has a key, a hash of (seed, document it starts in, position there). The windows with
   the smallest keys are the sequences, in the order of their keys: any prefix is as random a draw.

What that guarantees: a document that is added, taken away or changed touches one bundle (two where
it joins or parts them), and pushes out at most as many other sequences as its bundle brings new
ones; and where the pool was full, the documents at its end. All other windows, their keys and
their order stay. Long documents (`BUNDLE` windows or more) therefore never disturb each other's.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mctk.data.documents import load_documents
from mctk.data.sources import DATASETS, MixedSource, Source, TextError

if TYPE_CHECKING:
    import torch

POOL = 4
BUNDLE = 4
_HASH_RANGE = 1 << 64
_BATCH_CHARACTERS = 1 << 20  # text given to the tokenizer at once


@dataclass(frozen=True)
class TokenWindows:
    """Equally long sequences of tokens.

    Attributes:
        ids: LongTensor [N, length].
        digest: SHA-256 of the shape and the ids.
        sources: The label of the source of each window.
    """

    ids: torch.Tensor
    digest: str
    sources: list[str]


def calibration_windows(
    tokenizer: Any, source: Source | Sequence[MixedSource], sequences: int, length: int, seed: int
) -> TokenWindows:
    """Draws sequences as the module's head describes.

    Args:
        tokenizer: A transformers tokenizer.
        source: One source, or several that share the sequences by their weights.
        sequences: N, how many to draw.
        length: Tokens of each.
        seed: Salts the hashes.

    Returns:
        N windows of [length], by key; those of several sources are mixed through each other.

    Raises:
        TextError: If a source is not there, holds too little text, or gets no sequence.
    """
    drawn: list[tuple[bytes, str, list[int]]] = []
    sources = [source] if isinstance(source, Source) else list(source)
    counts = shares([getattr(part, "weight", 1.0) for part in sources], sequences)
    for part, count in zip(sources, counts, strict=True):
        if not count:
            raise TextError(
                f"'{part.label}' gets none of the {sequences} sequences by its weight: ask for "
                "more sequences, raise its weight, or leave it out",
                part,
            )
        windows = _draw(tokenizer, part, count, length, seed)
        if len(windows) < count:
            raise TextError(
                f"calibration text '{part.label}' gives {len(windows)} sequences of {length} "
                f"tokens, and {count} are asked for: add text, or lower calibration.sequences or "
                "calibration.length",
                part,
            )
        drawn += [(key, part.label, ids) for key, ids in windows[:count]]
    drawn.sort(key=lambda window: window[0])
    return _windows([ids for _, _, ids in drawn], [label for _, label, _ in drawn], length)


def evaluation_windows(
    tokenizer: Any, source: Source, length: int, limit: int | None = None
) -> TokenWindows:
    """Cuts a whole text into windows that do not overlap, as papers do for perplexity.

    Documents are joined as papers join them (wikitext2 and local text by an empty line, ptb and c4
    by a space; of c4 the first 1100 validation documents and at most 256 windows), tokenised once
    with the tokenizer's own special tokens, and cut; the tail is dropped. Conversations follow each
    other as their template ends them; it also puts the special tokens.

    Args:
        tokenizer: A transformers tokenizer.
        source: What to read; its split is `test` by default, for c4 `validation`.
        length: Tokens of a window.
        limit: Take at most so many windows.

    Raises:
        TextError: If the source is not there or holds not one window.
    """
    joiner, rows = "\n\n", None
    split = "test"
    if source.chat:
        joiner = ""
    elif source.dataset in DATASETS:
        dataset = DATASETS[source.dataset]
        joiner, rows, split = dataset.joiner, dataset.evaluation_rows, dataset.evaluation_split
        limit = min(filter(None, (limit, dataset.evaluation_windows)), default=None)
    text = joiner.join(islice(load_documents(source, split, tokenizer), rows))
    special = {"add_special_tokens": False} if source.chat else {}
    ids = tokenizer([text], verbose=False, **special)["input_ids"][0]
    count = len(ids) // length
    if count == 0:
        raise TextError(
            f"evaluation text '{source.label}' has {len(ids)} tokens, less than one window of "
            f"{length}: add text or lower its length",
            source,
        )
    count = min(count, limit or count)
    cut = [ids[start : start + length] for start in range(0, count * length, length)]
    return _windows(cut, [source.label] * count, length)


def _draw(
    tokenizer: Any, source: Source, count: int, length: int, seed: int
) -> list[tuple[bytes, list[int]]]:
    """Returns the `count` windows with the smallest keys, or all where there are fewer."""
    pool: list[tuple[bytes, list[int]]] = []
    wanted = POOL * count * length
    # A token is about four characters; where it is more, look further.
    kept = 8 * wanted
    while True:
        texts, complete = _smallest(load_documents(source, tokenizer=tokenizer), kept, seed)
        pool = _tokenise(tokenizer, texts, wanted)
        if complete or sum(len(ids) for _, ids in pool) >= wanted:
            break
        kept *= 4
    eos = None if source.chat else getattr(tokenizer, "eos_token_id", None)
    windows = sorted(_cut(pool, length, eos, seed))
    return windows[:count]


def _smallest(
    documents: Iterable[str], kept: int, seed: int
) -> tuple[list[tuple[bytes, str]], bool]:
    """Returns the documents with the smallest keys that hold `kept` characters, by key.

    The second value says whether they are all there is. Holds no other text in memory.
    """
    heap: list[tuple[int, bytes, str]] = []  # largest key first
    present: set[bytes] = set()
    size, complete = 0, True
    for text in documents:
        key = _key(seed, "document", text.encode())
        if key in present:
            continue
        present.add(key)
        heapq.heappush(heap, (-int.from_bytes(key, "big"), key, text))
        size += len(text)
        while size - len(heap[0][2]) >= kept:
            _, dropped, text = heapq.heappop(heap)
            present.discard(dropped)
            size -= len(text)
            complete = False
    return sorted((key, text) for _, key, text in heap), complete


def _tokenise(
    tokenizer: Any, texts: list[tuple[bytes, str]], wanted: int
) -> list[tuple[bytes, list[int]]]:
    """Tokenises documents in order, without special tokens, until they hold `wanted` tokens."""
    pool: list[tuple[bytes, list[int]]] = []
    total = start = 0
    while start < len(texts) and total < wanted:
        end, size = start, 0
        while end < len(texts) and (end == start or size < _BATCH_CHARACTERS):
            size += len(texts[end][1])
            end += 1
        batch = [text for _, text in texts[start:end]]
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for (key, _), ids in zip(texts[start:end], encoded, strict=True):
            if total < wanted:
                pool.append((key, ids))
                total += len(ids)
        start = end
    return pool


def _cut(
    pool: list[tuple[bytes, list[int]]], length: int, eos: int | None, seed: int
) -> Iterator[tuple[bytes, list[int]]]:
    """Yields the windows of all bundles with their keys, the module's head says how."""
    separator = [] if eos is None else [eos]
    target = BUNDLE * length
    bundle: list[tuple[bytes, list[int]]] = []

    def windows() -> Iterator[tuple[bytes, list[int]]]:
        ids: list[int] = []
        starts: list[tuple[int, bytes]] = []  # where in ids each document begins
        for key, document in bundle:
            starts.append((len(ids), key))
            ids += document + separator
        at = 0
        for start in range(0, len(ids) - length + 1, length):
            while at + 1 < len(starts) and starts[at + 1][0] <= start:
                at += 1
            offset, key = starts[at]
            yield _key(seed, f"window {start - offset}", key), ids[start : start + length]

    for key, ids in pool:
        alone = len(ids) >= target
        if alone:
            yield from windows()
            bundle = []
        bundle.append((key, ids))
        chance = int.from_bytes(_key(seed, "end", key)[:8], "big") / _HASH_RANGE
        if alone or chance < len(ids) / target:
            yield from windows()
            bundle = []
    yield from windows()


def _key(seed: int, purpose: str, content: bytes) -> bytes:
    return hashlib.blake2b(f"{seed} {purpose}\0".encode() + content, digest_size=16).digest()


def shares(weights: list[float], total: int) -> list[int]:
    """Splits `total` by weights; what rounding leaves goes to the largest remainders.

    Args:
        weights: One for each source.
        total: Sequences.

    Returns:
        How many each source gives; may be none.
    """
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _windows(windows: list[list[int]], sources: list[str], length: int) -> TokenWindows:
    import torch

    ids = torch.tensor(windows, dtype=torch.long).reshape(-1, length)
    digest = hashlib.sha256(f"{tuple(ids.shape)}\0".encode())
    digest.update(ids.numpy().astype("<i8").tobytes())
    return TokenWindows(ids, digest.hexdigest(), sources)
