"""A tiny random Mixtral on disk with a tokenizer of its own: all that an evaluation needs."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import VOCABULARY, tiny

WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space; knows w0 to w91 and takes all else for <unk>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS, "<unk>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_ends(backend)


def letters() -> PreTrainedTokenizerFast:
    """Splits into bytes.

    Some families' tokenizer class takes a file's vocabulary and cuts text by rules of its own,
    which know no words but those that are merged of bytes.
    """
    characters = ["Ġ", *map(chr, range(ord("!"), ord("!") + VOCABULARY - 5))]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *characters, "<unk>"])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _with_ends(backend)


def _with_ends(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def save_checkpoint(path: Path, seed: int = 0) -> Path:
    """Writes the model and its tokenizer; returns the directory."""
    tiny("mixtral", seed=seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def words(count: int, seed: int = 0) -> str:
    """A text of so many known words."""
    state, chosen = seed * 7919 + 1, []
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        chosen.append(WORDS[state // 65536 % len(WORDS)])
    return " ".join(chosen)
