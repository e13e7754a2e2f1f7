"""Where a decoder layer has its banks: one way of looking for every family.

Nearly every Mixture-of-Experts family of transformers shares one experts module, whose flags
(`is_transposed`, `is_concatenated`, `has_bias`, `has_gate`) say how its fused tensors are laid out.
We trust the flags and refuse what has none; there is no table of class names. Everything else that
multiplies by a matrix is an `nn.Linear` and a bank of one. Remote code of older days holds experts
as a list of equal MLPs; their matrices are known by name, and what they compute is tried out.

Bank names: `experts.gate|up|down`; for linears the module's path without its MoE block and without
`_proj`: `attention.q`, `mlp.down`, `shared_expert.gate` ... Routers are never banks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..errors import UserError
from ..runtime import (
    TermExpertList,
    TermExperts,
    TermLinear,
    TermModule,
    is_expert_list,
    join,
    list_layout,
)
from ..terms import BankShape, Bias
from .composite import is_of_other_sense, text_model_path
from .usage import reads_matrix

EXPERT_FLAGS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
_GROUPS = re.compile(r"(n|num)_(expert_)?groups?")
_TOP_GROUPS = re.compile(r"(top_?k|limited|num_limited)_groups?")
# The field's word for a part, where modules call it otherwise.
ALIASES = {
    "self_attn": "attention",
    "self_attention": "attention",
    "shared_experts": "shared_expert",
}


@dataclass(frozen=True)
class BankSite:
    """Where a bank lives in a decoder layer.

    Attributes:
        name: The bank's name.
        module: Path of the module that holds it, within the layer.
        part: "gate", "up" or "down" of an experts module or a list of experts; "linear" of an
            `nn.Linear`.
        shape: Members, output and input features.
        bias: Whether its members have a bias.
        groups: As in `Bank`.
    """

    name: str
    module: str
    part: str
    shape: BankShape
    bias: bool
    groups: int = 1


def neighbours(sites: Mapping[str, BankSite], names: Iterable[str]) -> list[str]:
    """The banks of every module that holds a named one: they are swapped and stored together."""
    modules = {sites[name].module for name in names}
    return [name for name, site in sites.items() if site.module in modules]


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of the model's decoder layers.

    Raises:
        UserError: There is no such list, or more than one.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and name.rpartition(".")[2] in ("layers", "h", "blocks")
    ]
    # A list inside a layer (experts, say) may have the same length by chance: take the outermost.
    outer = [
        (name, module)
        for name, module in found
        if not any(name.startswith(other + ".") for other, _ in found)
    ]
    if len(outer) > 1:
        # A vision tower may be as deep as the text model: whose configuration is that of the text?
        text = type(model.config.get_text_config())
        outer = [
            (name, module)
            for name, module in outer
            if type(model.get_submodule(text_model_path(model, name)).config) is text
        ]
    if len(outer) != 1:
        raise UserError(
            f"{type(model).__name__}: cannot tell its decoder layers: {len(outer)} lists of "
            f"{count} modules"
        )
    return outer[0]


def is_experts(module: nn.Module) -> bool:
    """Whether a module is transformers' shared experts module, or experts in compressed form."""
    if isinstance(module, TermExperts | TermExpertList):
        return True
    return all(hasattr(module, f) for f in EXPERT_FLAGS)


def has_expert_list(model: nn.Module) -> bool:
    """Whether any of a model's layers holds its experts as a list.

    Gradients of such experts take one sequence at a time.
    """
    return any(is_expert_list(module) for module in model.modules())


def bank_sites(layer: nn.Module) -> dict[str, BankSite]:
    """Finds the banks of one decoder layer from its modules' shapes (meta or real).

    Raises:
        UserError: The layer holds experts in a form that the adapter does not know, or two banks
            would have one name.
    """
    sites: list[BankSite] = []
    blocks: dict[str, int] = {}  # path of a MoE block and a dot, or "" → number of its experts
    modules = [(p, m) for p, m in layer.named_modules() if not is_of_other_sense(p)]
    for path, module in modules:
        if is_experts(module) or (_named_experts(path) and is_expert_list(module)):
            block = layer.get_submodule(path.rpartition(".")[0])
            found = _expert_sites(path, module, block)
            groups = router_groups(block, found[0].shape.members)[0]
            sites += [replace(site, groups=groups) for site in found]
            blocks[path[: path.rfind(".") + 1]] = found[0].shape.members
        elif _named_experts(path) or _holds_stacked_matrices(module):
            missing = [flag for flag in EXPERT_FLAGS if not hasattr(module, flag)]
            raise UserError(
                f"{type(layer).__name__}.{path}: {type(module).__name__} is not the experts "
                f"module that transformers shares between families (it has no {missing[0]}), nor a "
                "list of gated MLPs; it is not supported yet"
            )
    inside = tuple(site.module + "." for site in sites)
    for path, module in modules:
        if not _multiplies(module) or path.startswith(inside):
            continue
        block = next((b for b in blocks if path.startswith(b)), None)
        if block is not None and _is_router(layer, path, block, blocks[block]):
            continue
        if reads_matrix(layer, path):
            continue
        out = module.out_features
        shape = BankShape(1, out, module.in_features)
        name = _bank_name(path, block)
        sites.append(BankSite(name, path, "linear", shape, _has_bias(module)))
    names = [site.name for site in sites]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{type(layer).__name__}: two banks would be called {name}")
    return {site.name: site for site in sites}


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer, original or compressed, that computes no more than that.

    A class of its own forward does something else with its matrix (blocks of it for groups of
    heads, say) and stays as it is.
    """
    if isinstance(module, TermLinear):
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _named_experts(path: str) -> bool:
    return path.rpartition(".")[2] == "experts"


def _holds_stacked_matrices(module: nn.Module) -> bool:
    """Whether a module that is no convolution owns a stack of matrices: experts, most likely."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | TermModule):
        return False
    parameters = module.parameters(recurse=False)
    return any(p.dim() == 3 and min(p.shape) > 1 for p in parameters)


def _is_router(layer: nn.Module, path: str, block: str, experts: int) -> bool:
    """Whether a linear of a MoE block routes: it gives one number, or one per expert.

    A shared expert's matrices may have as many rows as there are experts; but they are several in
    one module, where a router is by itself. A router may be a small network of several linears:
    then the module around them knows how many experts it chooses.
    """
    inner = path.removeprefix(block).split(".")
    around = [block + ".".join(inner[:depth]) for depth in range(1, len(inner))]
    if "router" in inner or any(hasattr(layer.get_submodule(p), "top_k") for p in around):
        return True
    if layer.get_submodule(path).out_features not in (1, experts):
        return False
    parent = path.rpartition(".")[0]
    if parent == block.rstrip("."):
        return True
    siblings = layer.get_submodule(parent).children()
    return sum(isinstance(child, nn.Linear | TermLinear) for child in siblings) == 1


def router_groups(block: nn.Module, experts: int) -> tuple[int, int]:
    """Into how many groups a block's router divides its experts, and how many a token may use."""
    groups = top_groups = 1
    for module in (block, *block.children()):
        for name, value in vars(module).items():
            if isinstance(value, int) and value > 1:
                if _GROUPS.fullmatch(name) and experts % value == 0:
                    groups = value
                elif _TOP_GROUPS.fullmatch(name):
                    top_groups = value
    return groups, top_groups


def stated_groups(block: nn.Module) -> tuple[int, int] | None:
    """The two numbers of `router_groups` as one module of a block states both, true or not."""
    for module in (block, *block.children()):
        groups, chosen = (
            [v for name, v in vars(module).items() if type(v) is int and pattern.fullmatch(name)]
            for pattern in (_GROUPS, _TOP_GROUPS)
        )
        if groups and chosen:
            return groups[0], chosen[0]
    return None


def own_tensors(layer: nn.Module, site: BankSite) -> list[str]:
    """The names, within the bank's module, of what that module holds itself.

    This is what terms stand in for; its children (a norm after the experts, say) stay. Of a list
    of experts all children go.
    """
    module = layer.get_submodule(site.module)
    whole = isinstance(module, nn.ModuleList)
    named = [*module.named_parameters(recurse=whole), *module.named_buffers(recurse=whole)]
    return [name for name, _ in named]


def _has_bias(module: nn.Module) -> bool:
    if isinstance(module, TermLinear):
        return any(spec["kind"] == Bias.kind for spec in module.specs["linear"])
    return module.bias is not None


def _bank_name(path: str, block: str | None) -> str:
    if block:
        path = path.removeprefix(block)
    words = [ALIASES.get(word, word) for word in path.split(".")]
    words[-1] = words[-1].removesuffix("_proj")
    return ".".join(words)


def _expert_sites(path: str, module: nn.Module, block: nn.Module) -> list[BankSite]:
    if is_expert_list(module):
        join(block, module)  # who listens to a list must know the block that calls its experts
    if isinstance(module, nn.ModuleList):
        try:
            shapes, bias = list_layout(module)
        except ValueError as error:
            raise UserError(f"{path}: a list of experts, but {error}; not supported") from error
        return [BankSite(f"experts.{part}", path, part, shapes[part], bias) for part in shapes]
    if isinstance(module, TermExperts | TermExpertList):
        return [
            BankSite(
                f"experts.{part}",
                path,
                part,
                module.shapes[part],
                any(spec["kind"] == Bias.kind for spec in specs),
            )
            for part, specs in module.specs.items()
        ]
    wide_name = "gate_up_proj" if module.has_gate else "up_proj"
    held = {name for name, _ in module.named_parameters(recurse=False)}
    known = {wide_name, "down_proj"}
    known |= {f"{name}_bias" for name in known} if module.has_bias else set()
    if held != known:
        raise UserError(
            f"{path}: {type(module).__name__} holds {', '.join(sorted(held))} where its flags "
            f"promise {', '.join(sorted(known))}: a layout that mctk does not know"
        )
    down = module.down_proj
    experts, first, second = down.shape
    hidden, intermediate = (second, first) if module.is_transposed else (first, second)
    up = BankShape(experts, intermediate, hidden)
    shapes = {"gate": up} if module.has_gate else {}
    shapes |= {"up": up, "down": BankShape(experts, hidden, intermediate)}
    wide = getattr(module, wide_name)
    rows = intermediate * (1 + module.has_gate)
    expected = (experts, hidden, rows) if module.is_transposed else (experts, rows, hidden)
    if tuple(wide.shape) != expected:
        raise UserError(
            f"{path}: {type(module).__name__} holds {tuple(wide.shape)} beside down "
            f"{tuple(down.shape)}: a layout that its flags do not describe"
        )
    return [
        BankSite(f"experts.{part}", path, part, shape, bool(module.has_bias))
        for part, shape in shapes.items()
    ]
