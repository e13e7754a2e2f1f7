"""The names under which transformers knows us."""

from __future__ import annotations

from typing import Any

QUANT_METHOD = "mctk"
IMPLEMENTATION = "mctk"
"""Our experts implementation, for `model.set_experts_implementation`."""

GUARD = "mctk: a compressed checkpoint; install mctk and 'import mctk' before loading it"
"""`experts_implementation` in the config.json of a checkpoint.

Without mctk, transformers merely warns of an unknown quantisation method and goes on with random
experts. An unknown experts implementation is an error, for dense models too, and its message shows
this text.
"""


def is_ours(implementation: str | None) -> bool:
    """Whether an experts implementation is ours; texts of other versions are recognised too."""
    return isinstance(implementation, str) and implementation.split(":")[0] == IMPLEMENTATION


def check_implementation(module: Any) -> None:
    """Checks that an original experts module would run by our loop.

    Raises:
        ValueError: Its model's experts implementation is another one.
    """
    config = getattr(module, "config", None)
    implementation = getattr(config, "_experts_implementation", IMPLEMENTATION)
    if not is_ours(implementation):
        raise ValueError(
            f"{type(module).__name__} runs by the implementation {implementation!r}: call "
            f"model.set_experts_implementation({IMPLEMENTATION!r}) before observing"
        )
