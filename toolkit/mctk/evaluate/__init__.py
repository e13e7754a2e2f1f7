"""What a model is worth: token-level perplexity and lm-eval's tasks."""

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
    "Perplexity",
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
