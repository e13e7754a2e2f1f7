"""Truncation-aware whitened SVD: SVD-LLM, arXiv 2403.07378, 3.1. See docs/methods/svd_llm.md."""

from __future__ import annotations

from mctk.hookspecs import Method, hookimpl

from mctk_svdllm.methods import SvdLlm


@hookimpl
def methods() -> list[Method]:
    """Returns the methods of this plugin."""
    return [SvdLlm()]
