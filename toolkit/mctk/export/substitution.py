"""Experts that are constants, described as vLLM's open work on expert substitution reads them.

vLLM pull request 50415 ("constant-v1"), open when this was written; docs/export.md says what is
known of it and what is not. Experts that stay keep their tensors under their old numbers, a
constant expert has one tensor [H] instead, and the router is left whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .layout import Constants

VERSION = 1
FORMAT = "constant-v1"


def compression_config(layers: Iterable[Constants]) -> dict[str, Any]:
    """The `compression_config` of config.json.

    Args:
        layers: What is constant, for each layer that has such experts.
    """
    return {
        "producer": {"name": "mctk"},
        "transform_config": {
            "expert_substitution": {
                "version": VERSION,
                "router_semantics": {
                    "preserve_logical_expert_ids": True,
                    "preserve_router_weights": True,
                    "renormalize_after_substitution": False,
                },
                "targets": {
                    layer.path: {
                        "num_logical_experts": layer.experts,
                        "weight_layout": "compact_retained_experts",
                        "replacements": {
                            str(expert): {
                                "format": FORMAT,
                                "tensors": {"value": layer.name(expert)},
                            }
                            for expert in layer.numbers
                        },
                    }
                    for layer in layers
                },
            }
        },
    }
