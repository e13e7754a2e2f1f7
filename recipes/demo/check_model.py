"""Is a demo model telling? Perplexity, expert usage per domain, and random dropping of experts.

Perplexity: each domain's test documents in one stream with end tokens, non-overlapping windows of
512 tokens, mean loss per token, the first token of a window not predicted.
"""

import argparse
import copy
import itertools
import json
import math
from pathlib import Path

import torch
from demo_text import DOMAINS, WINDOW, mean_loss, read_texts, token_stream, windows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

# Alike in what is used here: ``gate``, which gives (logits, weights, chosen), and ``experts``.
Block = MixtralSparseMoeBlock | Qwen2MoeSparseMoeBlock


def moe_blocks(model: PreTrainedModel) -> list[Block]:
    """The mixture blocks from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, Block)]


def drop_experts(model: PreTrainedModel, share: float, seed: int) -> PreTrainedModel:
    """A copy without a random share of every layer's experts and their router rows.

    A shared expert stays.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in moe_blocks(model):
        count = block.gate.num_experts
        order = torch.randperm(count, generator=generator)
        kept = order[round(share * count) :].sort().values
        for module, name in (
            (block.gate, "weight"),
            (block.experts, "gate_up_proj"),
            (block.experts, "down_proj"),
        ):
            setattr(module, name, torch.nn.Parameter(getattr(module, name)[kept]))
        block.gate.num_experts = block.experts.num_experts = len(kept)
    return model


@torch.inference_mode()
def usage(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Share of the routed slots, (layers, experts), for windows (count, tokens)."""
    blocks = moe_blocks(model)
    counts = torch.zeros(len(blocks), blocks[0].gate.num_experts)
    handles = []
    for layer, block in enumerate(blocks):

        def count(_module: object, _inputs: object, output: tuple, layer: int = layer) -> None:
            counts[layer] += torch.bincount(output[2].flatten(), minlength=counts.shape[1])

        handles.append(block.gate.register_forward_hook(count))
    for ids in windows.split(8):
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return counts / counts.sum(1, keepdim=True)


def perplexities(model: PreTrainedModel, windows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Perplexity per domain, and over all windows together."""
    losses = {domain: mean_loss(model, ids) for domain, ids in windows.items()}
    total = sum(len(ids) for ids in windows.values())
    mean = sum(losses[domain] * len(ids) for domain, ids in windows.items()) / total
    return {domain: math.exp(loss) for domain, loss in {**losses, "all": mean}.items()}


def show(title: str, row: dict[str, float], unit: str = "") -> None:
    """A row of figures."""
    print(f"{title:24}" + "  ".join(f"{key} {value:.2f}{unit}" for key, value in row.items()))


def main() -> None:
    """Print the figures; write them down and judge them."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--model", type=Path, default=here / "model")
    parser.add_argument("--text", type=Path, default=here / "text/test")
    parser.add_argument("--seeds", type=int, default=8, help="random choices of dropped experts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # float32: faster than bfloat16 on most CPUs, and the stored weights are the same.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows = {
        domain: windows_of(token_stream(tokenizer, read_texts(args.text, domain)))
        for domain in DOMAINS
    }
    for domain, ids in windows.items():
        print(f"{domain}: {len(ids)} windows, {len(ids) * WINDOW} tokens")
    full = perplexities(model, windows)
    show("perplexity", full)

    rises = []
    for seed in range(args.seeds):
        dropped = perplexities(drop_experts(model, 0.5, seed), windows)
        rises.append({key: 100 * (dropped[key] / full[key] - 1) for key in full})
        show(f"half dropped, seed {seed}", rises[-1], " %")

    used = {domain: usage(model, ids) for domain, ids in windows.items()}
    tokens = torch.tensor([float(len(ids)) for ids in windows.values()])
    overall = torch.einsum("d,dle->le", tokens / tokens.sum(), torch.stack(list(used.values())))
    for layer, shares in enumerate(overall.tolist()):
        print(f"layer {layer} shares in %:  " + " ".join(f"{100 * share:5.1f}" for share in shares))
    distances = {
        f"{one}-{other}": (0.5 * (used[one] - used[other]).abs().sum(1)).tolist()
        for one, other in itertools.combinations(DOMAINS, 2)
    }
    for layer in range(len(overall)):
        row = {pair: values[layer] for pair, values in distances.items()}
        show(f"layer {layer} distances", row)

    least_rise = min(rise["all"] for rise in rises)
    least_share = overall.min().item()
    print(f"least rise {least_rise:.1f} % (telling from 15), least share {100 * least_share:.1f} %")
    if args.json:
        figures = {
            "perplexity": full,
            "rise_percent": rises,
            "shares": overall.tolist(),
            "shares_by_domain": {domain: shares.tolist() for domain, shares in used.items()},
            "total_variation": distances,
        }
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
