"""Models of transformers as banks: skeletons on meta, weight maps, the one adapter."""

from .adapter import module_specs, module_tensors, read_banks, write_banks
from .composite import (
    auto_class,
    auto_class_name,
    is_of_other_sense,
    language_part,
    side_parts,
)
from .install import installed, keeps_form
from .quantised import SETTINGS, quantisation, text_part
from .remote import gradients_enabled
from .rerouter import Rerouter
from .routing import RouterSite, find_router, renumbered
from .sites import (
    BankSite,
    bank_sites,
    find_layers,
    has_expert_list,
    is_experts,
    neighbours,
    own_tensors,
    stated_groups,
)
from .skeleton import (
    EXPERTS_IMPLEMENTATION,
    build,
    has_experts_interface,
    load_config,
    resolve_dtype,
)

__all__ = [
    "EXPERTS_IMPLEMENTATION",
    "SETTINGS",
    "BankSite",
    "Rerouter",
    "RouterSite",
    "auto_class",
    "auto_class_name",
    "bank_sites",
    "build",
    "find_layers",
    "find_router",
    "gradients_enabled",
    "has_expert_list",
    "has_experts_interface",
    "installed",
    "is_experts",
    "is_of_other_sense",
    "keeps_form",
    "language_part",
    "load_config",
    "module_specs",
    "module_tensors",
    "neighbours",
    "own_tensors",
    "quantisation",
    "read_banks",
    "renumbered",
    "resolve_dtype",
    "side_parts",
    "stated_groups",
    "text_part",
    "write_banks",
]
