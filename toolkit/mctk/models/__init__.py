"""Models of transformers as banks: skeletons on meta, weight maps, the one adapter."""

from .adapter import (
    BankSite,
    bank_sites,
    find_layers,
    has_expert_list,
    installed,
    is_experts,
    module_specs,
    module_tensors,
    neighbours,
    own_tensors,
    read_banks,
    write_banks,
)
from .remote import gradients_enabled
from .skeleton import (
    EXPERTS_IMPLEMENTATION,
    build,
    has_experts_interface,
    load_config,
    resolve_dtype,
)

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "BankSite",
    "bank_sites",
    "build",
    "find_layers",
    "gradients_enabled",
    "has_expert_list",
    "has_experts_interface",
    "installed",
    "is_experts",
    "load_config",
    "module_specs",
    "module_tensors",
    "neighbours",
    "own_tensors",
    "read_banks",
    "resolve_dtype",
    "write_banks",
]
