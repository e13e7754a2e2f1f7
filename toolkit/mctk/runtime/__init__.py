"""Modules that run compressed layers, and their registration with transformers.

`swap` puts them into a model; `from_pretrained` does so after `import mctk`.
"""

from .experts import Observer, TermExperts, experts_forward, observe
from .linear import TermLinear
from .names import GUARD, IMPLEMENTATION
from .owner import TermModule, meta_tensors, tensor_name
from .quantizer import (
    FORMAT_VERSION,
    MctkConfig,
    MctkHfQuantizer,
    checkpoint_config,
    load_providers,
    register,
)
from .swap import swap, swap_from_config

__all__ = [
    "FORMAT_VERSION",
    "GUARD",
    "IMPLEMENTATION",
    "MctkConfig",
    "MctkHfQuantizer",
    "Observer",
    "TermExperts",
    "TermLinear",
    "TermModule",
    "checkpoint_config",
    "experts_forward",
    "load_providers",
    "meta_tensors",
    "observe",
    "register",
    "swap",
    "swap_from_config",
    "tensor_name",
]
