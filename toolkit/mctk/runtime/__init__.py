"""Modules that run compressed layers, and their registration with transformers.

`swap` puts them into a model; `from_pretrained` does so after `import mctk`.
"""

from .counts import is_count_name, is_total_name, with_fewer
from .dynamic import dynamic_pruning
from .every import run_expert
from .expert_list import (
    TermExpertList,
    is_expert_list,
    join,
    observed_forward,
)
from .experts import Observer, TermExperts, experts_forward, gate_up_rows
from .gradients import GradientObserver
from .linear import TermLinear
from .list_layout import linears, list_layout
from .listen import NUMBERS, observe, observe_forwards, observe_gradients
from .names import GUARD, IMPLEMENTATION
from .owner import TermModule, meta_tensors, tensor_elements, tensor_name
from .quantizer import (
    FORMAT_VERSION,
    MctkConfig,
    MctkHfQuantizer,
    checkpoint_config,
    load_providers,
    register,
)
from .remote import restore_buffers
from .resize import resize, resized_entry
from .shared import Role, merged_groups, role
from .skipping import skip_policy
from .swap import swap, swap_from_config

__all__ = [
    "FORMAT_VERSION",
    "GUARD",
    "IMPLEMENTATION",
    "NUMBERS",
    "GradientObserver",
    "MctkConfig",
    "MctkHfQuantizer",
    "Observer",
    "Role",
    "TermExpertList",
    "TermExperts",
    "TermLinear",
    "TermModule",
    "checkpoint_config",
    "dynamic_pruning",
    "experts_forward",
    "gate_up_rows",
    "is_count_name",
    "is_expert_list",
    "is_total_name",
    "join",
    "linears",
    "list_layout",
    "load_providers",
    "merged_groups",
    "meta_tensors",
    "observe",
    "observe_forwards",
    "observe_gradients",
    "observed_forward",
    "register",
    "resize",
    "resized_entry",
    "restore_buffers",
    "role",
    "run_expert",
    "skip_policy",
    "swap",
    "swap_from_config",
    "tensor_elements",
    "tensor_name",
    "with_fewer",
]
