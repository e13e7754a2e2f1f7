"""What the demo's scripts share: reading its text, windows of tokens, and losses over them."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOMAINS = ("wordnet", "docs", "code", "bible")
WINDOW = 512


def read_texts(folder: Path, domain: str) -> list[str]:
    """The documents of ``folder/<domain>.jsonl``."""
    # Not splitlines(): JSON strings may hold Unicode line separators unescaped.
    rows = (folder / f"{domain}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(row)["text"] for row in rows if row]


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """All documents in one row of tokens, each closed by the end token."""
    ids: list[int] = []
    for document in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids.extend(document)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def windows_of(stream: torch.Tensor) -> torch.Tensor:
    """Non-overlapping windows; what is left over at the end is dropped."""
    count = len(stream) // WINDOW
    return stream[: count * WINDOW].view(count, WINDOW)


def next_token_loss(
    logits: torch.Tensor, ids: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Cross entropy of every token but each window's first, given those before it."""
    logits = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction=reduction)


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, windows: torch.Tensor, batch: int = 8) -> float:
    """Mean loss per predicted token over all windows."""
    total = 0.0
    for ids in windows.split(batch):
        total += next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, "sum").item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))
