"""A complete metrics.json as the engine writes it, of a run that never was."""

from __future__ import annotations

from typing import Any


def sizes(parameters: int, experts: int, active: int) -> dict[str, int]:
    return {
        "parameters": parameters,
        "expert_parameters": experts,
        "active_parameters": active,
        "macs_per_token": active - 1_000_000,
        "bytes": 2 * parameters,
    }


def perplexity(value: float, digest: str = "d1") -> dict[str, Any]:
    return {
        "protocol": "token_ppl/v1 window=512 stride=512",
        "windows": 2,
        "tokens": 1022,
        "nll": 1.5,
        "perplexity": value,
        "window_nll": [700.0, 833.0],
        "digest": digest,
    }


def task(value: float, constant: bool = False) -> dict[str, Any]:
    return {
        "metrics": {"acc": {"value": value, "stderr": 0.01}},
        "version": 1.0,
        "n_shot": 0,
        "samples": 2376,
        "chance": 0.25,
        "constant": constant,
        "group": None,
    }


def metrics(kept: int = 7_000_000, budget: str = "remove 40 % of experts") -> dict[str, Any]:
    trace = [
        {"step": 0, "bank": "experts.gate", "bank_error": 0.01, "layer_error": 0.0002},
        {"step": 0, "bank": "experts.down", "bank_error": None, "layer_error": 0.03},
    ]
    bank = {
        "summary": "LowRank r=64 pivoted",
        "rank": 64,
        "parameters": 123456,
        "bytes": 246912,
        "relative_weight_error": 0.2,
    }
    layers = [
        {
            "layer": layer,
            "banks": {"experts.gate": bank, "experts.down": bank},
            "trace": trace,
            "tokens_per_expert": [100, 0, 50, 7],
            "warnings": ["expert 1 saw no token"] if layer == 0 else [],
            "seconds": 1.5,
        }
        for layer in range(2)
    ]
    return {
        "mctk_version": "0.1.0",
        "versions": {
            "torch": "2.13",
            "transformers": "5.24",
            "python": "3.11",
            "platform": "Linux",
        },
        "environment": {
            "platform": "Linux x86_64",
            "device": "cuda:0",
            "device_name": "NVIDIA H100",
            "cuda": "13.0",
            "threads": 16,
            "dtype": "bfloat16",
            "mctk_commit": "2042215+",
        },
        "command": "mctk run recipes/small.yaml",
        "recipe": {"steps": [{"method": "decompose/svdllm", "version": 1}]},
        "recipe_text": "model: owner/tiny-moe\n",
        "model": {
            "name": "owner/tiny-moe",
            "model_type": "mixtral",
            "path": "/cache/models--owner--tiny-moe/snapshots/0123",
            "hub": "owner/tiny-moe",
            "revision": "main",
            "commit": "0123",
            "license": "apache-2.0",
        },
        "output_kind": "mctk",
        "calibration": {
            "digest": "c0ffee",
            "sequences": 64,
            "length": 512,
            "tokens": 32768,
            "sources": ["docs"],
        },
        "sizes": {
            "original": sizes(11_000_000, 10_000_000, 4_000_000),
            "planned": sizes(kept, kept - 1_000_000, 2_500_000),
            "attained": sizes(kept, kept - 1_000_000, 2_500_000),
        },
        "budget": {
            "requested": budget,
            "of": "experts",
            "unit": "parameters",
            "allowed": 7_010_000,
            "attained": kept,
            "shortfall_fraction": 0.0009,
        },
        "layers": layers,
        "gate": {
            "streamed_equal": True,
            "fresh_process_equal": None,
            "tensors_changed": 12,
            "tensors_total": 40,
            "sizes_equal": False,
            "max_abs_logit": 12.3456,
        },
        "evaluation": {
            "original": {"perplexity": {"docs": perplexity(4.0)}, "tasks": {"arc": task(0.6)}},
            "compressed": {
                "perplexity": {"docs": perplexity(5.0)},
                "tasks": {"arc": task(0.5, constant=True)},
            },
            "paired": {"docs": {"delta_log_ppl": 0.2231, "low": 0.2, "high": 0.25}},
        },
        "statistics": {"cache_hits": 3, "cache_misses": 5, "sweeps": 2},
        "seconds": {"sweep": 150.0, "gate": 5.0, "total": 200.4},
        "peak_memory_bytes": 1_230_000_000,
        "warnings": ["few tokens | in all"],
    }
