"""Models of transformers as banks: skeletons on meta, weight maps, the one adapter."""

from .adapter import (
    BankSite,
    bank_sites,
    find_layers,
    has_expert_list,
    is_experts,
    module_specs,
    module_tensors,
    neighbours,
    own_tensors,
    read_banks,
    write_banks,
)
from .install import installed, keeps_form
from .remote import gradients_enabled
from .routing import Rerouter, RouterSite, find_router, is_count_name
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
    "Rerouter",
    "RouterSite",
    "bank_sites",
    "build",
    "find_layers",
    "find_router",
    "gradients_enabled",
    "has_expert_list",
    "has_experts_interface",
    "installed",
    "is_count_name",
    "is_experts",
    "keeps_form",
    "load_config",
    "module_specs",
    "module_tensors",
    "neighbours",
    "own_tensors",
    "read_banks",
    "resolve_dtype",
    "write_banks",
]
