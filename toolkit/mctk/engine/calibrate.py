"""The forward sweep of a set of runs: what any of them needs is collected once, into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..files import write_text
from ..models import EXPERTS_IMPLEMENTATION, read_banks
from ..statistics import LayerCollector, Need, StatisticsCache
from ..sweep import BoundaryStore, ForwardSweep, LayerVisit, StreamedModel
from .progress import Reporter

if TYPE_CHECKING:
    from ..models import BankSite


def cache_context(
    model: StreamedModel, fingerprint: str, digest: str, batch: int
) -> dict[str, Any]:
    """All that a statistic's numbers depend on besides need and layer.

    Args:
        model: The streamed model.
        fingerprint: Hash of the model's files.
        digest: Hash of the token windows.
        batch: Sequences per forward pass (it moves the last bits).
    """
    return {
        "model": fingerprint,
        "tokens": digest,
        "batch": batch,
        "activations": "original",
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": model.config.get_text_config()._attn_implementation,
        "experts": EXPERTS_IMPLEMENTATION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def calibrate(
    model: StreamedModel,
    ids: torch.Tensor,
    batch: int,
    needs: dict[int, list[Need]],
    sites: list[dict[str, BankSite]],
    cache: StatisticsCache,
    state: Path,
    reporter: Reporter,
    boundaries: BoundaryStore | None = None,
) -> int:
    """Collects what the cache lacks of the original's forward statistics.

    Args:
        model: The streamed model.
        ids: Calibration sequences [N, T].
        batch: Sequences per forward pass.
        needs: Layer → canonical needs, united over all runs; those that a forward sweep of the
            original model cannot give are passed over.
        sites: Per layer, its banks.
        cache: Where statistics go.
        state: Directory for the hidden states, so that a killed sweep goes on.
        reporter: Progress.
        boundaries: Keeps what enters the layers, for a backward sweep; the sweep is then run even
            if no statistic is missing, unless the store is complete.

    Returns:
        The number of sweeps that it took: 0 if everything was in the cache.
    """
    needs = {
        layer: [need for need in wanted if not need.gradient and not need.current]
        for layer, wanted in needs.items()
    }
    missing = {
        layer: [need for need in wanted if not cache.has(need, layer)]
        for layer, wanted in needs.items()
    }
    misses = sum(len(wanted) for wanted in missing.values())
    cache.misses += misses
    cache.hits += sum(len(wanted) for wanted in needs.values()) - misses
    missing = {layer: wanted for layer, wanted in missing.items() if wanted}
    tag = state / "hidden.of"  # which tokens and model the kept hidden states belong to
    context = repr(sorted(cache.context.items()))
    if not tag.exists() or tag.read_text() != context:
        (state / "hidden.safetensors").unlink(missing_ok=True)
        for gradients in state.glob("gradients-*.safetensors"):
            gradients.unlink()
        if boundaries is not None:
            boundaries.clear()
        write_text(tag, context)
    count = len(model.layers)
    kept = boundaries is None or (boundaries.complete(count) and boundaries.has(count))
    if not missing and kept:
        return 0
    sweep = ForwardSweep(model, ids, batch, state / "hidden.safetensors", boundaries)
    start = sweep.saved_layer()
    # Saved states serve if nothing is missing below the layer that they enter.
    if start > min(missing, default=count) or not (
        boundaries is None or boundaries.complete(start)
    ):
        start = 0

    def visit(layer: LayerVisit) -> list[torch.Tensor]:
        wanted = missing.get(layer.index, [])
        banks = read_banks(layer.module, layer.index)
        collector = LayerCollector(
            layer.module, layer.index, sites[layer.index], banks, wanted, model.device
        )
        collector.sample(layer.inputs, layer.more)
        outputs = []
        with collector.listening():
            for b in range(len(layer.inputs)):
                outputs.append(layer.run(b).cpu())
                layer.inputs[b] = outputs[-1][:0]  # used: free it
        result = collector.result()
        for need in wanted:
            cache.put(need, layer.index, result[need])
        reporter.step(f"layer {layer.index}" + _spread(collector.frequency))
        return outputs

    with reporter.phase("calibrate", count - start):
        sweep.run(visit, start)
    (state / "hidden.safetensors").unlink(missing_ok=True)
    return 1


def _spread(frequency: torch.Tensor) -> str:
    """How evenly tokens reached the experts, in words for the log."""
    if not frequency.numel():
        return ""
    return f": {int(frequency.min())} to {int(frequency.max())} tokens per expert"
