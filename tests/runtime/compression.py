"""Compresses tiny models in memory with random terms of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mctk.runtime import TermModule, checkpoint_config, swap
from mctk.terms import BankShape, Bias, Dense, LowRank, Sparse, Term, pack
from torch import nn


def split(module: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The weights [E, out, in] and biases [E, out] of an original experts module by part."""

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = getattr(module, name).detach()
        bias = getattr(module, name + "_bias").detach() if module.has_bias else None
        return weight.transpose(1, 2) if module.is_transposed else weight, bias

    down = read("down_proj")
    if not module.has_gate:
        return {"up": read("up_proj"), "down": down}
    weight, bias = read("gate_up_proj")
    half = weight.shape[1] // 2
    rows = [slice(0, half), slice(half, None)] if module.is_concatenated else [
        slice(0, None, 2),
        slice(1, None, 2),
    ]  # fmt: skip
    gate, up = ((weight[:, r], None if bias is None else bias[:, r]) for r in rows)
    return {"gate": gate, "up": up, "down": down}


def exact_terms(module: nn.Module) -> dict[str, list[Term]]:
    """An experts module (or a linear layer, as "linear") as one `Dense` and `Bias` a bank."""
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()[None]
        parts = {"linear": (module.weight.detach()[None], bias)}
    else:
        parts = split(module)
    terms: dict[str, list[Term]] = {}
    for part, (weight, bias) in parts.items():
        shape = BankShape(*weight.shape)
        members = range(shape.members)
        terms[part] = [Dense(shape, members, weight.contiguous())]
        if bias is not None:
            terms[part].append(Bias(shape, members, bias.contiguous()))
    return terms


def random_terms(exact: dict[str, list[Term]], seed: int) -> dict[str, list[Term]]:
    """Terms of every kind and storage in place of exact ones; ranks depend on the seed.

    Even seeds: a shared, pruned base and low-rank deltas. Odd seeds: merged experts, one expert
    replaced by its mean output, one dropped, sparse residuals. Biases stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    terms: dict[str, list[Term]] = {}
    for part, (dense, *biases) in exact.items():
        shape = dense.shape
        members, out, into = shape.members, shape.out_features, shape.in_features
        every = list(range(members))
        rank = 3 + seed % 4
        if seed % 2 == 0:
            kept = out // 2
            rows = torch.randperm(out, generator=generator)[:kept].sort().values.int()
            cols = torch.randperm(into, generator=generator)[: into // 2].sort().values.int()
            base = Dense(shape, [0] * members, noise(1, kept, into // 2), rows=rows, cols=cols)
            if part == "gate":  # V shared
                delta = LowRank(shape, every, [0] * members, U=noise(members, out, rank),
                                V=noise(1, rank, into)).pivot()  # fmt: skip
            else:
                delta = LowRank(shape, every, every, U=noise(members, out, rank),
                                V=noise(members, rank, into))  # fmt: skip
                delta = delta.pivot() if part == "down" else delta
            terms[part] = [base, delta, *biases]
        else:
            slots: list[int | None] = [e // 2 for e in every]
            slots[-1] = None
            merged = Dense(shape, slots, noise((members + 1) // 2, out, into))
            positions = torch.stack(
                [torch.randperm(out * into, generator=generator)[:9] for _ in every]
            ).int()
            sparse = Sparse(shape, slots if part == "down" else every,
                            noise(members, 9), positions)  # fmt: skip
            terms[part] = [merged, sparse, *biases]
            if members > 1 and part == "down":
                # The last expert is dropped, the one before is a constant.
                slots[-2] = None
                merged = Dense(shape, slots, noise((members + 1) // 2, out, into))
                constant = [0 if e == members - 2 else None for e in every]
                terms[part] = [merged, Bias(shape, constant, noise(1, out))]
    return terms


def compressible(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model, and one attention projection of every layer, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed") or path.endswith("o_proj")
    }


def compress(model: nn.Module, chosen: dict[str, dict[str, list[Term]]]) -> dict[str, dict]:
    """Swaps modules for modules of the given terms; returns the description that `swap` took."""
    described = {}
    for path, terms in chosen.items():
        specs = {part: [term.spec() for term in bank] for part, bank in terms.items()}
        linear = "linear" in specs
        described[path] = {
            "type": "linear" if linear else "experts",
            "terms": specs["linear"] if linear else specs,
        }
    described = json.loads(json.dumps(described))
    swap(model, described)
    for path, terms in chosen.items():
        module = model.get_submodule(path)
        assert isinstance(module, TermModule)
        for part, bank in terms.items():
            module.set_terms(part, bank)
    return described


def some_packed(terms: dict[str, list[Term]], seed: int) -> dict[str, list[Term]]:
    """The same with the weights of some parts stored in few bits, in groups of odd sizes."""
    chosen = ("up",) if seed % 2 == 0 else ("down", "linear")
    return {
        part: [
            pack(term, bits=(4, 3, 8, 2)[(seed + i) % 4], group=7 + i, symmetric=i % 2 == 1)
            if part in chosen
            else term
            for i, term in enumerate(bank)
        ]
        for part, bank in terms.items()
    }


def compress_mixed(model: nn.Module) -> dict[str, dict]:
    """Compresses all but the last of the modules in question, with terms of every kind."""
    chosen: dict[str, dict[str, list[Term]]] = {}
    count = {True: 0, False: 0}
    for path, module in list(compressible(model).items())[:-1]:
        linear = isinstance(module, nn.Linear)
        seed = count[linear]
        chosen[path] = some_packed(random_terms(exact_terms(module), seed), seed)
        count[linear] += 1
    return compress(model, chosen)


def by_hand(
    compressed: TermModule, original: nn.Module, x: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """What a module of terms must give for ``x [T, H]``: token by token, from whole matrices."""

    def multiply(part: str, member: int, row: torch.Tensor) -> torch.Tensor:
        bank = compressed.bank(part)
        weight, bias = bank.materialise(member)
        out = row.new_zeros(bank.shape.out_features) if weight is None else weight @ row
        return out if bias is None else out + bias

    if isinstance(original, nn.Linear):
        return torch.stack([multiply("linear", 0, row) for row in x])
    index, weights = routing
    total = torch.zeros_like(x)
    for token, row in enumerate(x):
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            up = multiply("up", expert, row)
            gate = multiply("gate", expert, row)
            halves = torch.cat if original.is_concatenated else torch.stack
            fused = halves([gate, up], dim=-1).flatten()
            h = original._apply_gate(fused[None])[0]
            total[token] += weight * multiply("down", expert, h)
    return total


def write(model: nn.Module, described: dict, directory: Path) -> None:
    """Writes a checkpoint as `mctk run` does: the source's config.json with our keys added."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    config = checkpoint_config(json.loads(path.read_text()), described)
    path.write_text(json.dumps(config, indent=2))
