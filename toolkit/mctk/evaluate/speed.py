"""Tokens per second of a model that is in memory: prefill and decoding, medians of repeats.

Noisy: whatever else the machine does at the time counts. Compare only rows that were measured one
after the other on an idle machine, by the same protocol, threads and device.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..recipe import Speed

PROTOCOL = "speed"
VERSION = 1  # raised whenever the figures change


def measure_speed(model: Any, ids: torch.Tensor | None, settings: Speed) -> dict[str, Any]:
    """Times forward passes over whole prompts, and one new token a sequence at a time.

    Args:
        model: A loaded causal language model.
        ids: Token ids [N, T] to take prompts from; None, or too few of them: random ones.
        settings: Batch, length, new tokens, repeats.

    Returns:
        "prefill" and "decode" (None where nothing is to be generated): median, least and most
        tokens per second; "protocol" with batch, lengths, repeats and threads.
    """
    import torch

    prompt = _prompt(model, ids, settings.batch, settings.length)
    steps = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": settings.new + 1,
        "min_new_tokens": settings.new + 1,
        "do_sample": False,
        "pad_token_id": 0,
    }
    prefill: list[float] = []
    decode: list[float] = []
    with torch.inference_mode():
        for repeat in range(settings.repeats + 1):
            started = _now(model)
            model(input_ids=prompt, use_cache=False, logits_to_keep=1)
            forward = _now(model) - started
            if settings.new:
                # Its first token is the prompt's; what is left are the others.
                started = _now(model)
                model.generate(prompt, **steps)
                rest = max(_now(model) - started - forward, 1e-9)
            if repeat == 0:
                continue  # warm-up
            prefill.append(prompt.numel() / forward)
            if settings.new:
                decode.append(settings.new * settings.batch / rest)
    return {
        "prefill": _median(prefill),
        "decode": _median(decode) if decode else None,
        "protocol": (
            f"{PROTOCOL}/v{VERSION} batch={settings.batch} prompt={settings.length} "
            f"new={settings.new} repeats={settings.repeats} threads={torch.get_num_threads()}"
        ),
    }


def _prompt(model: Any, ids: torch.Tensor | None, batch: int, length: int) -> torch.Tensor:
    import torch

    if ids is not None and ids.numel() >= batch * length:
        return ids.reshape(-1)[: batch * length].view(batch, length).to(model.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, length), generator=generator).to(model.device)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _median(values: list[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}
