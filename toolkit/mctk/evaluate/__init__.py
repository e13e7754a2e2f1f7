"""What a model is worth: perplexity, lm-eval's tasks, divergence from another, speed."""

from .bootstrap import bootstrap_mean
from .divergence import LogitStore
from .harness import load_tasks, run_tasks
from .perplexity import (
    Perplexity,
    forward_logits,
    paired_bootstrap,
    perplexity,
    streamed_logits,
    window_nll,
)
from .suite import compare, evaluate_model

__all__ = [
    "LogitStore",
    "Perplexity",
    "bootstrap_mean",
    "compare",
    "evaluate_model",
    "forward_logits",
    "load_tasks",
    "paired_bootstrap",
    "perplexity",
    "run_tasks",
    "streamed_logits",
    "window_nll",
]
