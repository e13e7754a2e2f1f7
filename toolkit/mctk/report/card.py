"""README.md of a compressed checkpoint: the model card that the Hub shows."""

from __future__ import annotations

from typing import Any

import yaml

from .parts import Metrics, methods_of, perplexity_table, sizes_table, tasks_table
from .report import recipe_and_command
from .tables import document, get, section

TAG = "mctk"  # by which the hub finds results, and we ours
LOADING = """\
```bash
pip install mctk
```

```python
import mctk  # tells transformers how to read the compressed layers
from transformers import {auto}, AutoTokenizer

path = "."  # this directory, or its name on the Hub
model = {auto}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```"""
DYNAMIC = """\
Some channels of the bases that experts share are skipped at run time. Which ones is decided for
each forward pass from its own tokens, so a sequence's logits depend on what else is in its batch.
`mctk.runtime.dynamic_pruning(model, enabled=False)` makes it compute all of them."""
LOADING_PLAIN = """\
```python
from transformers import {auto}, AutoTokenizer

path = "."  # this directory, or its name on the Hub
model = {auto}.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```"""


# What the Hub calls the tasks of what an Auto class loads.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
}


def render_card(metrics: Metrics) -> str:
    """Writes the model card.

    Args:
        metrics: What metrics.json holds; whatever is absent or null is left out.

    Returns:
        Markdown with YAML front matter.
    """
    name = get(metrics, "model", "name")
    title = f"{name}, compressed by mctk" if name else "A model compressed by mctk"
    return _front_matter(metrics) + document(
        f"# {title}",
        _introduction(metrics),
        section("Use", _loading(metrics)),
        section("Size", _sizes(metrics)),
        section("Results", *_results(metrics)),
        section("Reproduce", *recipe_and_command(metrics), _versions(metrics)),
    )


def hub_id(metrics: Metrics) -> str | None:
    """The base model's name on the Hub, or None where it came from a local directory."""
    name = get(metrics, "model", "hub")
    return name if isinstance(name, str) else None


def _front_matter(metrics: Metrics) -> str:
    base = hub_id(metrics)
    entries: dict[str, Any] = {}
    if base:
        # The Hub knows finetune, adapter, merge and quantized; its tree of models shows what was
        # made smaller without training under the last.
        entries |= {"base_model": base, "base_model_relation": "quantized"}
    entries |= {"library_name": "transformers", "pipeline_tag": TASKS[_auto_class(metrics)]}
    entries["tags"] = [TAG, "moe", "compressed"]
    if get(metrics, "model", "license"):
        entries["license"] = get(metrics, "model", "license")
    return "---\n" + yaml.safe_dump(entries, sort_keys=False, allow_unicode=True) + "---\n\n"


def _introduction(metrics: Metrics) -> str:
    base = hub_id(metrics)
    source = f"[{base}](https://huggingface.co/{base})" if base else get(metrics, "model", "name")
    methods = ", ".join(methods_of(metrics))
    sentence = f"This is {source or 'a Mixture-of-Experts language model'}, made smaller"
    budget = get(metrics, "budget", "requested")
    sentence += f" ({budget})" if budget else ""
    sentence += f" with {methods}." if methods else "."
    trained = any(method.startswith("distill ") for method in methods_of(metrics))
    training = "" if trained else " Nothing was trained after compression."
    return f"{sentence}{training} `report.md` says what was lost where."


def _loading(metrics: Metrics) -> str:
    if metrics.get("output_kind", "mctk") not in (None, "mctk"):
        return LOADING_PLAIN.format(auto=_auto_class(metrics))
    layers = [layer.get("banks") or {} for layer in metrics.get("layers") or []]
    summaries = [str(get(bank, "summary")) for banks in layers for bank in banks.values() if bank]
    dynamic = any("dynamic" in summary for summary in summaries)
    loading = LOADING.format(auto=_auto_class(metrics))
    return loading + ("\n\n" + DYNAMIC if dynamic else "")


def _auto_class(metrics: Metrics) -> str:
    """The Auto class that loads the checkpoint: of the original's, the same."""
    return get(metrics, "model", "auto_class") or "AutoModelForCausalLM"


def _sizes(metrics: Metrics) -> str:
    table = sizes_table(metrics)
    return table.markdown() if table.rows else ""


def _results(metrics: Metrics) -> list[str]:
    original = get(metrics, "evaluation", "original")
    compressed = get(metrics, "evaluation", "compressed")
    tables = [
        perplexity_table(original, compressed, get(metrics, "evaluation", "paired")),
        tasks_table(original, compressed),
    ]
    return [table.markdown() for table in tables if table.rows]


def _versions(metrics: Metrics) -> str:
    versions = {"mctk": metrics.get("mctk_version"), **(metrics.get("versions") or {})}
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"Made with {known}." if known else ""
