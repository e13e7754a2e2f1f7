"""Writes a compressed checkpoint: one shard a layer, one for the rest, then index and config."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Source, read_header
from ..checkpoint.source import FLOATING, INDEX
from ..errors import UserError
from ..files import write_json, write_tensors
from ..models import module_specs, module_tensors, neighbours, own_tensors
from ..runtime import checkpoint_config
from ..terms import Bank, Term

if TYPE_CHECKING:
    from torch import nn

    from ..plan import Plan

# What a model directory holds beside weights that a user of the model needs.
CARRIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.jinja", "chat_template*", "LICENSE*", "NOTICE*", "*.py",
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
        terms: list[Term] = [term.to(dtype=dtype) for term in banks[name].terms]
        for term in terms:
            if not all(bool(torch.isfinite(t).all()) for t in term.tensors().values()):
                raise UserError(
                    f"storage_dtype: {name} of layer {layer} does not fit into "
                    f"{str(dtype).removeprefix('torch.')}; choose one with a wider range"
                )
        stored[name] = Bank(name, layer, site.shape, terms)
    return stored


def write_layer(
    plan: Plan, output: Path, layer: int, module: nn.Module, stored: dict[str, Bank]
) -> dict[str, Any]:
    """Writes one layer's shard.

    Args:
        plan: The run's plan.
        output: The checkpoint's directory.
        layer: The layer's number.
        module: The layer, original modules.
        stored: All banks of the changed modules, as they are to be stored.

    Returns:
        The layer's record: file, module specs, how many tensors are new and how many copied.
    """
    prefix = f"{plan.model.layers_path}.{layer}."
    specs = {prefix + path: spec for path, spec in module_specs(module, stored).items()}
    tensors = {prefix + name: t for name, t in module_tensors(module, stored).items()}
    gone = {
        f"{prefix}{site.module}.{own}"
        for name, site in plan.sites[layer].items()
        if name in stored
        for own in own_tensors(module, site)
    }
    targets = plan.model.weights.targets
    copied = [
        name for name in plan.model.layer_tensors[layer] if not gone.issuperset(targets[name])
    ]
    file = shard_name(layer, len(plan.model.layers))
    new = len(tensors)
    with plan.source.slices(copied) as slices:
        tensors |= {name: slices[name][...] for name in copied}
        write_tensors(output / file, tensors)
    return {"file": file, "modules": specs, "new": new, "copied": len(copied)}


def write_outer(plan: Plan, output: Path) -> dict[str, Any]:
    """Writes the shard of everything outside the layers, copied bit by bit."""
    names = [*plan.model.outer_tensors, *plan.model.weights.unread]
    file = shard_name(-1, len(plan.model.layers))
    with plan.source.slices(names) as slices:
        write_tensors(output / file, {name: slices[name][...] for name in names})
    return {"file": file, "copied": len(names)}


def write_index(output: Path, files: Iterable[str]) -> tuple[int, int]:
    """Writes the index over the shards.

    Returns:
        Parameters and payload bytes, counted on the written files.
    """
    weight_map: dict[str, str] = {}
    parameters = nbytes = 0
    for file in files:
        for name, info in read_header(output / file).items():
            weight_map[name] = file
            nbytes += info.nbytes
            parameters += info.numel if info.dtype in FLOATING else 0
    write_json(output / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    return parameters, nbytes


def write_config(
    plan: Plan, output: Path, modules: dict[str, Any], providers: list[str], method: Any
) -> None:
    """Writes config.json: the source's, with our keys and the storage dtype."""
    config = dict(plan.source.config)
    if plan.recipe.storage_dtype != "auto":
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = plan.recipe.storage_dtype
    if modules:
        config = checkpoint_config(config, modules, providers, method)
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
    """A bank's terms in a few words, for reports: "dense shared ×2 + lowrank r=64"."""
    words = []
    for term in bank.terms:
        stored = len({slot for slot in term.slots if slot is not None})
        word = term.kind + (f" shared ×{stored}" if stored < bank.shape.members else "")
        rank = getattr(term, "rank", None)
        word += f" r={rank}" if rank is not None else ""
        storage = term.spec().get("storage", "plain")
        words.append(word + (f" {storage}" if storage != "plain" else ""))
    return " + ".join(words)


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
