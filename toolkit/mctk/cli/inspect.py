"""`mctk inspect`: what a checkpoint holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mctk.sweep import StreamedModel

EPILOG = """\b
Reads config.json and the headers of the weight files only; works for original and for compressed
checkpoints. The bank names it prints are what a recipe's `targets` select.

\b
Examples:
  mctk inspect mistralai/Mixtral-8x7B-v0.1
  mctk inspect owner/name@branch
  mctk inspect runs/svdllm_demo --layers"""


@click.command(epilog=EPILOG)
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--layers", is_flag=True, help="Show every layer instead of groups of equal ones.")
@click.option(
    "--trust-remote-code", is_flag=True, help="DANGEROUS: run code that the directory carries."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(
    model: str, revision: str | None, layers: bool, trust_remote_code: bool, as_json: bool
) -> None:
    """Show MODEL's architecture, banks, parameters by part and compressed terms."""
    from mctk.checkpoint import open_source
    from mctk.registry import load_plugins
    from mctk.sweep import StreamedModel

    load_plugins().register_kinds()
    source = open_source(model, revision, weights=False)
    streamed = StreamedModel(source, trust_remote_code=trust_remote_code)
    found = inspect_model(streamed)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(found, layers)


def inspect_model(model: StreamedModel) -> dict[str, Any]:
    """Architecture, sizes, banks and terms of a checkpoint, as JSON data."""
    from mctk.checkpoint import experts_per_token, size_of_tensors, terms_in
    from mctk.models import bank_sites
    from mctk.planning import count_model, side_sizes

    config = model.config.get_text_config()
    rows = []
    parts = dict.fromkeys(("experts", "attention", "other banks"), 0)
    for index, layer in enumerate(model.layers):
        for name, site in bank_sites(layer).items():
            terms = terms_in(layer, site)
            parameters = sum(term.parameters() for term in terms)
            first = name.split(".")[0]
            parts[first if first in parts else "other banks"] += parameters
            rows.append(
                {
                    "layer": index,
                    "bank": name,
                    "members": site.shape.members,
                    "out": site.shape.out_features,
                    "in": site.shape.in_features,
                    "terms": [_term(term) for term in terms],
                    "parameters": parameters,
                }
            )
    sizes = count_model(model, {}, stored=True).as_dict()
    unread = {
        "multi-token prediction": model.unread.predictors,
        "other unread": model.unread.others,
    }
    unread_parts: dict[str, dict[str, Any]] = {
        what: {"first": names[0], **size_of_tensors(model.source, names)}
        for what, names in unread.items()
        if names
    }
    quantised = model.source.quantised
    embeddings = model.language.get_input_embeddings().weight.numel()
    parts["embeddings"] = embeddings
    for part, weighs in side_sizes(model).items():
        parts[f"{part} (not text)"] = weighs["parameters"]
    parts |= {what: part["parameters"] for what, part in unread_parts.items()}
    parts["rest (head, norms, routers)"] = sizes["parameters"] - sum(parts.values())
    quantization = model.source.config.get("quantization_config") or {}
    return {
        "path": str(model.source.path),
        "hub": model.source.origin and model.source.origin.name,
        "commit": model.source.commit,
        "model_type": model.config.model_type,
        "architectures": model.source.config.get("architectures"),
        "compressed": bool(quantization),
        "format_version": quantization.get("format_version"),
        "method": quantization.get("method"),
        "layers": len(model.layers),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "experts_per_token": experts_per_token(model.config),
        "files": len(model.source.files),
        "sizes": sizes,
        "parts": parts,
        "quantised": quantised.label if quantised is not None else None,
        "dequantised_bytes": count_model(model, {}).bytes,
        "unread": unread_parts,
        "unread_tensors": list(model.weights.unread),
        "banks": rows,
    }


def _term(term: Any) -> str:
    """A term in a few words: its kind, its rank, how many slots its members share."""
    from mctk.terms import packed_bits

    spec = term.spec()
    words = [spec["kind"]]
    rank = getattr(term, "rank", None)
    if rank is not None:
        words.append(f"r={rank}")
    if spec.get("storage", "plain") != "plain":
        words.append(spec["storage"])
    words += [f"{bits} bits" for bits in packed_bits(term)]
    slots = {slot for slot in term.slots if slot is not None}
    if len(slots) < term.shape.members:
        words.append(f"{len(slots)} slots")
    return " ".join(words)


def _show(found: dict[str, Any], every_layer: bool) -> None:
    from mctk.cli.tables import print_table
    from mctk.report.tables import count, ranges, size

    sizes = found["sizes"]
    kind = "original"
    if found["compressed"]:
        method = found["method"]
        made = ", ".join(method) if isinstance(method, list) else method
        kind = f"compressed, format {found['format_version']}" + (f", by {made}" if made else "")
    where = f"{found['hub']} at commit {found['commit']}" if found["hub"] else found["path"]
    click.echo(
        f"{where}: {found['model_type']}, {kind}\n"
        f"{found['layers']} layers, hidden {found['hidden_size']}, vocabulary "
        f"{found['vocab_size']}, {found['experts_per_token']} experts per token; "
        f"{count(sizes['parameters'])} parameters ({count(sizes['active_parameters'])} active), "
        f"{size(sizes['bytes'])} in {found['files']} files\n"
    )
    whole = sizes["parameters"]
    print_table(
        ["part", "parameters", "share"],
        [[part, count(n), f"{n / whole:.1%}"] for part, n in found["parts"].items() if n],
    )
    click.echo()
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row in found["banks"]:
        key: tuple[Any, ...] = (
            row["bank"], row["members"], row["out"], row["in"], tuple(row["terms"]),
            row["parameters"], row["layer"] if every_layer else None,
        )  # fmt: skip
        groups.setdefault(key, []).append(row["layer"])
    lines = [
        [ranges(layers), bank, f"{members} × " * (members > 1) + f"{out} × {columns}",
         " + ".join(terms), count(parameters)]
        for (bank, members, out, columns, terms, parameters, _), layers in groups.items()
    ]  # fmt: skip
    print_table(["layers", "bank", "matrices", "terms", "parameters each"], lines)
    if found["quantised"]:
        click.echo(
            f"\nweights stored in {found['quantised']}: {size(sizes['bytes'])}; they are read, and "
            f"written where not compressed, dequantised: {size(found['dequantised_bytes'])}"
        )
    for what, part in found["unread"].items():
        click.echo(
            f"\n{what}: {part['tensors']} tensors that transformers does not read with the model, "
            f"{count(part['parameters'])} parameters, {size(part['bytes'])}: {part['first']} ..."
        )
