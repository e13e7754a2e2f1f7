"""Writes a compressed checkpoint: one shard a layer, one for the rest, then index and config."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Share, Source, read_header, without_predictors
from ..checkpoint.source import FLOATING, INDEX
from ..checkpoint.weights import TORCH_DTYPES
from ..errors import UserError
from ..files import write_json, write_tensors
from ..models import find_router, keeps_form, module_specs, module_tensors, neighbours, own_tensors
from ..planning import config_without, layer_shares, only_prunes, uniform
from ..runtime import checkpoint_config, resized_entry, tensor_elements
from ..terms import Bank, PackedTensor, Term, compact, packed_bits, removed_members

if TYPE_CHECKING:
    from torch import nn

    from ..planning import Plan, Size

# What a model directory holds beside weights that a user of the model needs: tokenizer, what turns
# images and sound into tensors, licence and code.
CARRIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.jinja", "chat_template*", "*processor_config.json",
    "LICENSE*", "NOTICE*", "*.py",
)  # fmt: skip


def shard_name(index: int, layers: int) -> str:
    """File name of a layer's shard; index -1 is the shard of embeddings and head."""
    return f"model-{index + 2:05d}-of-{layers + 1:05d}.safetensors"


def cast_terms(
    plan: Plan, layer: int, banks: dict[str, Bank], rewritten: set[str]
) -> dict[str, Bank]:
    """All banks of the changed modules in the dtypes in which they are stored.

    Rewritten terms go to the storage dtype; the others return to the dtype that they came in.

    Raises:
        UserError: Values overflow the storage dtype.
    """
    sites = plan.sites[layer]
    stored = {}
    for name in neighbours(sites, rewritten):
        site = sites[name]
        dtype = (plan.storage_dtype if name in rewritten else plan.source_dtype)(layer, site)
        terms = [_laid_out(term.to(dtype=dtype)) for term in banks[name].terms]
        for term in terms:
            if not all(bool(torch.isfinite(t).all()) for t in term.tensors().values()):
                raise UserError(
                    f"storage_dtype: {name} of layer {layer} does not fit into "
                    f"{str(dtype).removeprefix('torch.')}; choose one with a wider range"
                )
        stored[name] = Bank(name, layer, site.shape, terms)
    return stored


def _laid_out(term: Term) -> Term:
    """The term with tensors that lie in memory as they will when they are read.

    What was computed of transposed weights may keep their strides, and a product with those has
    other last bits.
    """
    tensors = term.tensors()
    plain = {n: t for n, t in tensors.items() if not isinstance(t, PackedTensor)}
    if all(tensor.is_contiguous() for tensor in plain.values()):
        return term
    return term.with_tensors({**tensors, **{n: t.contiguous() for n, t in plain.items()}})


def only_fewer(
    plan: Plan, sizes: Size, layer: int, banks: Mapping[str, Bank], original: Mapping[str, Bank]
) -> bool:
    """Whether a layer's experts are the original's, only fewer: their tensors can be copied.

    Args:
        plan: The run's plan.
        sizes: All sizes.
        layer: The layer.
        banks: All its banks, after all steps.
        original: The same before.
    """
    if not (keeps_form(banks.values()) and only_prunes(plan, sizes, layer)):
        return False
    gone = removed_members(banks.values())
    return all(
        _equal(bank.materialise(member), original[name].materialise(member))
        for name, bank in banks.items()
        if plan.sites[layer][name].part != "linear"
        for member in range(bank.shape.members)
        if member not in gone
    )


def _equal(new: Iterable[torch.Tensor | None], old: Iterable[torch.Tensor | None]) -> bool:
    """Whether two members are the same (weight, bias)."""
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(new, old, strict=True)
    )


def write_layer(
    plan: Plan,
    output: Path,
    layer: int,
    module: nn.Module,
    stored: dict[str, Bank],
    keep_form: bool = False,
) -> dict[str, Any]:
    """Writes one layer's shard.

    Of removed experts nothing is written, and the router without their rows.

    Args:
        plan: The run's plan.
        output: The checkpoint's directory.
        layer: The layer's number.
        module: The layer, original modules.
        stored: All banks of the changed modules, as they are to be stored.
        keep_form: Whether experts are only fewer than before: those that stay are copied as the
            source has them, and no terms stand for them.

    Returns:
        The layer's record: file, module specs, the experts that stay if some were removed, how many
        tensors are new or smaller and how many copied.
    """
    prefix, sites = f"{plan.model.layers_path}.{layer}.", plan.sites[layer]
    removed = removed_members(stored.values())
    kept: list[int] | None = None
    shrinking: dict[str, Share] = {}
    if removed:
        router = find_router(module, sites)
        assert router is not None
        kept = [expert for expert in range(router.experts) if expert not in removed]
        shrinking = layer_shares(plan, layer, router)
        experts = [name for name in stored if sites[name].part != "linear"]
        new = {} if keep_form else {name: compact(stored[name], kept) for name in experts}
        stored = {name: bank for name, bank in stored.items() if name not in experts} | new
    specs = {prefix + path: spec for path, spec in module_specs(module, stored).items()}
    tensors = {prefix + name: t for name, t in module_tensors(module, stored).items()}
    gone = {
        f"{prefix}{site.module}.{own}"
        for name, site in sites.items()
        if name in stored
        for own in own_tensors(module, site)
    }
    targets = plan.model.weights.targets
    copied = [
        name for name in plan.model.layer_tensors[layer] if not gone.issuperset(targets[name])
    ]
    # What is loaded together with what is gone, and stays, is written as the model has it.
    parted = {name for name in copied if not gone.isdisjoint(targets[name])}
    copied = [name for name in copied if name not in parted]
    apart = _apart(plan, module, prefix, parted, gone)
    file = shard_name(layer, len(plan.model.layers))
    changed = len(tensors) + sum(name in shrinking for name in copied)
    dtype = _storage_dtype(plan, layer) if shrinking else None
    with plan.source.slices(copied) as slices:
        for name in copied:
            share = shrinking.get(name, Share(name))
            found = share.renamed(kept or [])
            if found is not None:
                tensors[found] = _rest(slices[name][...], share, kept or [], dtype)
        write_tensors(output / file, tensors | apart)
    return {
        "file": file,
        "modules": specs,
        "kept": kept,
        "new": changed,
        "copied": len(copied) + len(apart) - sum(name in shrinking for name in copied),
    }


def _apart(
    plan: Plan, module: nn.Module, prefix: str, parted: Iterable[str], gone: set[str]
) -> dict[str, torch.Tensor]:
    """What some source tensors feed beside what is gone, under the model's names.

    Args:
        plan: The run's plan.
        module: The layer, filled.
        prefix: Its path and a dot.
        parted: The source tensors.
        gone: Tensors of the model that terms stand for.
    """
    held = module.state_dict()
    found = {}
    for name in parted:
        dtype = TORCH_DTYPES[plan.source.tensors[name].dtype]
        for target in plan.model.weights.targets[name]:
            if target not in gone:
                found[target] = held[target.removeprefix(prefix)].to(dtype)
    return found


def _storage_dtype(plan: Plan, layer: int) -> torch.dtype:
    """The dtype in which a layer's changed experts are stored."""
    down = next(site for site in plan.sites[layer].values() if site.part == "down")
    return plan.storage_dtype(layer, down)


def _rest(
    tensor: torch.Tensor, share: Share, kept: list[int], dtype: torch.dtype | None
) -> torch.Tensor:
    """What stays of a source tensor; experts' own in the dtype in which changed ones are stored."""
    tensor = share.rest(tensor, kept)
    return tensor.to(dtype) if share.of_experts and dtype is not None else tensor


def copy_tensors(source: Source, names: Iterable[str], path: Path) -> None:
    """Writes a file of some of a source's tensors, copied bit by bit, one after the other.

    Embeddings, vision towers and tensors that transformers does not read may together be larger
    than any layer. What the source stores quantised is dequantised.

    Args:
        source: Where they are.
        names: The tensors.
        path: The file.
    """
    infos = [source.tensors[name] for name in names]
    empty = {
        info.name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta")
        for info in infos
    }
    with source.slices(empty) as slices:
        write_tensors(path, empty, read=lambda name: slices[name][...])


def write_outer(plan: Plan, output: Path, left: Mapping[int, int]) -> dict[str, Any]:
    """Writes the shard of everything outside the layers.

    Args:
        plan: The run's plan.
        output: The checkpoint's directory.
        left: How many experts each layer keeps, of the layers that have lost some: on what
            config.json says of them depends what becomes of unread tensors.

    Returns:
        The record: file, how many tensors it has.
    """
    gone = set(plan.left_out(uniform(plan, left)))
    model = plan.model
    inside = {name for names in model.layer_tensors for name in names}
    side = [name for name in model.side_tensors if name not in inside]
    unread = [name for name in plan.unread.names if name not in gone]
    names = [*model.outer_tensors, *side, *unread]
    file = shard_name(-1, len(model.layers))
    copy_tensors(plan.source, names, output / file)
    return {"file": file, "copied": len(names)}


def write_index(output: Path, files: Iterable[str], modules: Mapping[str, Any]) -> tuple[int, int]:
    """Writes the index over the shards.

    Args:
        output: The checkpoint's directory.
        files: Its shards.
        modules: Module path → its description: only that tells which bytes are packed weights.

    Returns:
        Parameters and payload bytes, counted on the written files.
    """
    elements = tensor_elements(modules)
    weight_map: dict[str, str] = {}
    parameters = nbytes = 0
    for file in files:
        for name, info in read_header(output / file).items():
            weight_map[name] = file
            nbytes += info.nbytes
            parameters += elements.get(name, info.numel if info.dtype in FLOATING else 0)
    write_json(output / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    return parameters, nbytes


def experts_kept(layers: Mapping[str, Mapping[str, Any]]) -> dict[int, int]:
    """How many experts each layer keeps, of the layers that have lost some.

    Args:
        layers: The layers' records by number, as the manifest has them.
    """
    numbers = sorted(int(number) for number, record in layers.items() if record.get("kept"))
    return {number: len(layers[str(number)]["kept"]) for number in numbers}


def written_kind(plan: Plan, modules: Mapping[str, Any], left: Mapping[int, int]) -> str:
    """The kind of output: "native" where all that is left is an ordinary model with fewer experts.

    Args:
        plan: The run's plan.
        modules: Module path → type and term specs, of modules that terms stand for.
        left: How many experts each layer keeps, of the layers that have lost some.
    """
    alike = not left or config_without(plan, left) is not None
    return "mctk" if modules or not alike else "native"


def write_config(
    plan: Plan,
    output: Path,
    modules: dict[str, Any],
    providers: list[str],
    method: Any,
    left: Mapping[int, int],
) -> None:
    """Writes config.json: the source's, with the number of experts, the storage dtype and our keys.

    Where layers for multi-token prediction are left out it says of none.

    Args:
        plan: The run's plan.
        output: The checkpoint's directory.
        modules: Module path → type and term specs, of modules that terms stand for.
        providers: Plugins whose kinds of term these are.
        method: What made the checkpoint, for people to read.
        left: How many experts each layer keeps, of the layers that have lost some.
    """
    smaller = config_without(plan, left) if left else None
    config = dict(plan.source.config if smaller is None else smaller)
    experts = {}
    if smaller is None:
        for layer, count in left.items():
            module = plan.model.layers[layer]
            router = find_router(module, plan.sites[layer])
            assert router is not None
            experts[f"{plan.model.layers_path}.{layer}"] = resized_entry(
                module, router.module, count, router.tensors, router.counts
            )
    if plan.recipe.storage_dtype != "auto":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = plan.recipe.storage_dtype
    gone = set(plan.left_out(uniform(plan, left)))
    if plan.unread.predictors and gone.issuperset(plan.unread.predictors):
        config = without_predictors(config)
    if modules or experts:
        config = checkpoint_config(config, modules, providers, method, experts)
    write_json(output / "config.json", config)


def copy_companions(source: Source, output: Path) -> list[str]:
    """Copies tokenizer, generation config, chat template, licence and code of the model."""
    copied = []
    for pattern in CARRIED:
        for path in sorted(source.path.glob(pattern)):
            if path.is_file() and path.name not in copied:
                shutil.copyfile(path, output / path.name)
                copied.append(path.name)
    return copied


def describe(bank: Bank) -> str:
    """A bank's terms in a few words: "dense shared ×2 + lowrank r=64", "dense 6 of 8"."""
    words = []
    for term in bank.terms:
        stored = len({slot for slot in term.slots if slot is not None})
        served = sum(slot is not None for slot in term.slots)
        word = term.kind + (f" shared ×{stored}" if stored < served else "")
        word += f" {served} of {bank.shape.members}" if 0 < served < bank.shape.members else ""
        rank = getattr(term, "rank", None)
        word += f" r={rank}" if rank is not None else ""
        storage = term.spec().get("storage", "plain")
        word += f" {storage}" if storage != "plain" else ""
        words.append(word + "".join(f" {bits} bits" for bits in packed_bits(term)))
    # Some methods make a term for each expert.
    return " + ".join(w if n == 1 else f"{n} × {w}" for w, n in Counter(words).items())


def relative_weight_error(bank: Bank, original: Bank) -> float:
    """Squared Frobenius distance of a bank's matrices from the original's, over their energy."""
    error = energy = 0.0
    # In float32: a product of factors taken in bfloat16 would be rounded once more, and CPUs are
    # many times slower at it.
    terms: list[Term] = [term.to(dtype=torch.float32) for term in bank.terms]
    bank = Bank(bank.name, bank.layer, bank.shape, terms)
    for member in range(bank.shape.members):
        weight = bank.materialise(member)[0]
        exact = original.materialise(member)[0]
        if exact is None:
            continue
        exact = exact.float()
        difference = exact if weight is None else exact - weight
        error += float(difference.square().sum(dtype=torch.float64))
        energy += float(exact.square().sum(dtype=torch.float64))
    return error / energy if energy else 0.0
