"""Takes a family through the toolkit: from headers to a compressed checkpoint that loads again."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mctk.checkpoint import Source
from mctk.cli import cli
from mctk.errors import UserError
from mctk.models import (
    bank_sites,
    find_layers,
    language_part,
    own_tensors,
    read_banks,
    write_banks,
)
from mctk.sweep import StreamedModel, stream_logits
from mctk.terms import Bank, Term
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from tests.tiny_checkpoint import letters, tokenizer, words

from .loading import FRESH
from .methods import METHODS, check_result, results, write_recipe
from .models import head_for, load, tiny, token_ids
from .native_check import check_native
from .outcome import COLUMNS, WORKS, Outcome
from .remote import save_remote
from .statistics_check import check_statistics
from .text import NO_LANGUAGE_MODEL

LOOKALIKE = "remote code"
"""The name of the look-alike of DeepSeek-MoE-16B, whose experts are modules in a list."""


def check_any(name: str, directory: Path) -> Outcome:
    """Checks a family, or that mctk refuses one that is no language model.

    Args:
        name: A model type, or `LOOKALIKE`.
        directory: Where models and results are written to; empty.
    """
    if name in NO_LANGUAGE_MODEL:
        return check_refused(name, directory)
    return check_family(name, directory)


def check_family(
    name: str, directory: Path, methods: Mapping[str, dict[str, Any]] | None = None
) -> Outcome:
    """Takes a family's tiny random model through the whole toolkit.

    Args:
        name: Its model type, a key of `CONFIGS`, or `LOOKALIKE`.
        directory: Where models and results are written to; empty.
        methods: As `METHODS`, which it is by default.

    Returns:
        What works, and why what does not does not.
    """
    methods = METHODS if methods is None else methods
    path = save(name, directory / "model")
    outcome = Outcome(name, remark=_remark(path))
    with outcome.item("inspect"):
        _command("inspect", str(path), "--trust-remote-code")
        first = next(iter(methods))  # the others are planned when they run
        _command("plan", str(write_recipe(directory, first, methods[first])))
    with outcome.item("banks"):
        check_banks(path)
    with outcome.item("streamed"):
        check_streamed(path)
    with outcome.item("statistics"):
        check_statistics(path, directory)
    outputs = {}
    for method, found in results(directory, methods).items():
        with outcome.item(method):
            check_result(found)
            outputs[method] = directory / method
    with outcome.item("native"):
        if (said := check_native(name, directory / "native")) != WORKS:
            raise UserError(said)
    with outcome.item("fresh", "again"):
        _check_loading(outcome, path, outputs)
    outcome.items = {key: outcome.items[key] for key in COLUMNS if key in outcome.items}
    return outcome


def _remark(path: Path) -> str:
    """What a reader of the table should know of a family beside what works."""
    config = json.loads((path / "config.json").read_text())
    [architecture] = config["architectures"]
    if "auto_map" in config:
        return (
            "a look-alike of DeepSeek-MoE-16B with code of its own, experts in an `nn.ModuleList`"
        )
    if not architecture.endswith("ForCausalLM"):
        return f"`{architecture}`, by its text model"
    return ""


def check_refused(name: str, directory: Path) -> Outcome:
    """Checks that every command refuses a model that is no language model, in the same words."""
    path = save(name, directory / "model")
    recipe = str(write_recipe(directory, "reap", METHODS["reap"]))
    said = set()
    for command in (("inspect", str(path)), ("plan", recipe), ("run", recipe)):
        try:
            _command(*command)
        except UserError as error:
            said.add(str(error))
        else:
            said.add(f"{command[0]} accepts it")
    message = "; ".join(sorted(said))
    return Outcome(name, dict.fromkeys(COLUMNS, message), refused=len(said) == 1)


def save(name: str, path: Path) -> Path:
    """Writes a family's tiny random model with a tokenizer, and a text for it beside it."""
    if name == LOOKALIKE:
        save_remote(path)
    else:
        tiny(name).save_pretrained(path, max_shard_size="40kB")
    tokenizer().save_pretrained(path)
    if not AutoTokenizer.from_pretrained(path, trust_remote_code=True)(words(1))["input_ids"]:
        letters().save_pretrained(path)
    lines = [json.dumps({"text": words(60, seed)}) for seed in range(8)]
    (path.parent / "text.jsonl").write_text("\n".join(lines))
    return path


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a model in memory, its tensors copied to aligned memory first."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        return language_part(model)[1](input_ids=ids, use_cache=False).logits


def streamed_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] with a layer in memory at a time."""
    return torch.cat(
        list(stream_logits(StreamedModel(Source(path), trust_remote_code=True), ids, ids.shape[0]))
    )


def _command(*arguments: str) -> None:
    """Runs a command of mctk as from a shell; errors are raised."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(list(arguments), prog_name="mctk", standalone_mode=False, obj={"debug": False})


def check_banks(path: Path) -> None:
    """Every layer's banks are read, the layer is emptied, and the banks put all of it back."""
    model = load(path)
    expected = logits_of(model, token_ids())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = 0
    for index, layer in enumerate(find_layers(model)[1]):
        sites = bank_sites(layer)
        experts += any(site.name.startswith("experts.") for site in sites.values())
        banks = read_banks(layer, index)
        banks = {
            name: dataclasses.replace(bank, terms=_copies(bank)) for name, bank in banks.items()
        }
        for site in sites.values():
            module = layer.get_submodule(site.module)
            for own in own_tensors(layer, site):  # not a norm on what experts give, say
                module.get_parameter(own).data.zero_()
        write_banks(layer, banks)
    if not experts:
        raise AssertionError("no layer has banks of experts")
    if not torch.equal(logits_of(model, token_ids()), expected):
        raise AssertionError("other logits after banks went out and came back")
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, tensors[name]):
            raise AssertionError(f"{name} is another after banks went out and came back")


def _copies(bank: Bank) -> list[Term]:
    return [
        term.with_tensors({key: tensor.clone() for key, tensor in term.tensors().items()})
        for term in bank.terms
    ]


def check_streamed(path: Path) -> None:
    """A streamed forward gives the bits of the model's own."""
    ids = token_ids()
    own, streamed = logits_of(load(path), ids), streamed_logits(path, ids)
    if not torch.equal(own, streamed):
        worst = float((own - streamed).abs().max())
        raise AssertionError(f"the streamed forward gives other logits, by up to {worst:.3g}")


def _check_loading(outcome: Outcome, original: Path, outputs: Mapping[str, Path]) -> None:
    if not outputs:
        raise UserError("there is no result to load")
    head = head_for(AutoConfig.from_pretrained(original, trust_remote_code=True)).__name__
    ids = token_ids()
    said: dict[str, list[str]] = {"fresh": [], "again": []}
    for method, path in outputs.items():
        expected = path.parent / f"{method}-expected.safetensors"
        logits = streamed_logits(path, ids)
        save_file({"ids": ids, "logits": logits.contiguous()}, expected)
        found = FRESH.ask({"path": str(path), "head": head, "expected": str(expected)})
        for key, answer in found.items():
            if answer != WORKS:
                said[key].append(f"{COLUMNS[method]}: {answer}")
    for key, reasons in said.items():
        outcome.items[key] = "; ".join(reasons) or WORKS
