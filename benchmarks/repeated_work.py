"""What a comparison saves by finding each decomposition once: one method at several sizes.

    OMP_NUM_THREADS=1 python benchmarks/repeated_work.py                       # the demo model
    OMP_NUM_THREADS=1 python benchmarks/repeated_work.py --hidden 512 --inner 1024

Rows of one method at several budgets run as one set, twice: with no room for directions
(`mctk.linalg.remembered`), so that every row computes its own, and as they are. Printed are CPU
seconds of the phases that decompose, size curves and compression, and whether the written files are
the same, byte by byte. A wider layer, a random one, shows what grows: decompositions with the third
power of its width, the error trace with the second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mctk.engine import Reporter, compress, run
from mctk.recipe import load_recipe
from mctk.registry import load_plugins

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo"
ROWS: dict[str, dict[str, Any]] = {
    "svd_llm": {"steps": [{"decompose": "svd_llm"}]},
    "svd_llm, by_loss": {
        "steps": [{"decompose": "svd_llm", "options": {"storage": "pivoted"}}],
        "allocate": {"method": "by_loss"},
    },
    "frequency, delta_svd": {"steps": [{"merge": "frequency"}, {"decompose": "delta_svd"}]},
}


class Clock(Reporter):
    """Counts the CPU seconds of each phase."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """See `Reporter.phase`."""
        begun = time.process_time()
        with super().phase(name, total):
            yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - begun


def random_model(directory: Path, hidden: int, inner: int) -> Path:
    """Writes a random Mixtral of one layer with the demo's tokenizer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / name, directory)
    return directory


def measured(
    row: dict[str, Any], model: Path, work: Path, arguments: argparse.Namespace
) -> tuple[float, str]:
    """CPU seconds of size curves and compression, and the hash of all written tensors."""
    registry, clock = load_plugins(), Clock()
    recipes = [
        load_recipe(
            {
                "model": str(model),
                "dtype": "float32",
                "calibration": {
                    "text": str(DEMO / "text" / "calibration" / "*.jsonl"),
                    "sequences": arguments.sequences,
                    "length": 512,
                },
                "budget": {"remove": float(remove), "of": "experts"},
                "gate": False,
                "output": str(work / remove),
                **row,
            },
            registry=registry,
        )
        for remove in arguments.remove.split(",")
    ]
    run(recipes, registry, cache=work.parent / "cache", reporter=clock)
    digest = hashlib.sha256()
    for recipe in recipes:
        for shard in sorted(recipe.output.glob("*.safetensors")):
            digest.update(shard.read_bytes())
    return clock.cpu["compress"] + clock.cpu.get("size curves", 0.0), digest.hexdigest()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, help="of a random layer; the demo model without")
    parser.add_argument("--inner", type=int, default=1024, help="its intermediate size")
    parser.add_argument("--remove", default="0.2,0.4,0.6", help="budgets, with commas")
    parser.add_argument("--sequences", type=int, default=16, help="of calibration")
    parser.add_argument("--only", choices=ROWS, help="one method")
    arguments = parser.parse_args()
    room = compress.DIRECTIONS_SHARE
    print(f"{'':22} each its own   found once   ratio   same bytes")
    for name, row in ROWS.items():
        if arguments.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            model = DEMO / "model"
            if arguments.hidden:
                model = random_model(work / "model", arguments.hidden, arguments.inner)
            compress.DIRECTIONS_SHARE = 0.0
            alone, first = measured(row, model, work / "alone", arguments)
            compress.DIRECTIONS_SHARE = room
            once, second = measured(row, model, work / "once", arguments)
        same = "yes" if first == second else "NO"
        print(f"{name:22} {alone:10.1f} s {once:10.1f} s {alone / once:7.2f}   {same}")


if __name__ == "__main__":
    main()
