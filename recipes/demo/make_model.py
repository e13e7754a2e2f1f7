"""Train a demo model: a small mixture, upcycled from a dense model trained on the same text.

``--kind`` picks one of the two (see ``KINDS``): ``mixtral`` has few large experts, ``qwen2_moe``
many small ones and a shared expert. Steps, each skipped when its result is in ``--work`` already
(so that a stopped run goes on):

1. a byte-level BPE tokenizer, trained on the training text;
2. a dense model, whose MLP is as large as the experts that a token of ``qwen2_moe`` goes through,
   or as one expert of ``mixtral``;
3. the mixture: each expert starts as a copy of the dense MLP, or of a slice of it, in which a
   random share of the channels is drawn anew ("drop-upcycling"), so that experts differ from the
   first step on; then training with a load-balancing loss for every layer by itself.

A phase's length is given in minutes (for a deadline) or in steps (the same result every time, on
the same machine). ``--restart`` forgets what ``--work`` holds; ``--from-scratch`` trains a mixture
without steps 2 and 3's copying, for comparison: its experts share no common part.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from demo_mixture import KINDS, POSITIONS, VOCABULARY, BalanceLoss, upcycle
from demo_text import (
    DOMAINS,
    WINDOW,
    mean_loss,
    next_token_loss,
    read_texts,
    token_stream,
    windows_of,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# One token for both ends of a document, as in GPT-2: a model never trained on a separate
# beginning token would be handed an untrained embedding by tools that put one in front.
END = "<|endoftext|>"
BATCH = 4  # windows a step
WARM_UP = 100  # steps
HELD_OUT_WINDOWS = 16  # per domain, for the losses watched during training


@dataclass
class Phase:
    """How far a training phase is; saved and loaded with the weights."""

    name: str
    minutes: float
    steps: int | None
    peak: float
    final: float  # share of the peak learning rate that the cosine ends at
    step: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)

    def progress(self) -> float:
        """From 0 to 1, by steps where they are given, else by the clock."""
        return self.step / self.steps if self.steps else self.seconds / (60 * self.minutes)

    def rate(self) -> float:
        """The learning rate of the coming step: linear warm-up, then a cosine."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        decayed = self.final + (1 - self.final) * cosine
        return self.peak * decayed * min(1.0, (self.step + 1) / WARM_UP)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so every text can be encoded; adds no tokens of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def batch_at(stream: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """The windows of a step, (batch, tokens): every epoch passes over all, in a new order."""
    windows = windows_of(stream)
    per_epoch = len(windows) // BATCH
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[place * BATCH : (place + 1) * BATCH]].long()


def held_out_losses(model: PreTrainedModel, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean loss per domain over the first calibration windows."""
    model.eval()
    losses = {name: round(mean_loss(model, windows), 4) for name, windows in held_out.items()}
    model.train()
    return losses


def save_state(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, phase: Phase
) -> None:
    """All that training needs to go on, in one file, replaced at once."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "phase": asdict(phase),
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(
    model: PreTrainedModel,
    phase: Phase,
    stream: torch.Tensor,
    held_out: dict[str, torch.Tensor],
    args: argparse.Namespace,
) -> Phase:
    """Run a phase to its end, from its saved state if there is one."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    path = args.work / f"{phase.name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        # The schedule may be changed between runs; how far the phase is may not.
        done = {key: state["phase"][key] for key in ("step", "seconds", "log")}
        phase = Phase(**{**asdict(phase), **done})
    balance = BalanceLoss(model)
    model.train()
    snapshot_due = phase.name == "mixture" and phase.seconds < 60 * args.snapshot_minutes
    next_report = phase.seconds
    recent: list[float] = []
    last = time.monotonic()
    while phase.progress() < 1:
        ids = batch_at(stream, phase.step, args.seed + (phase.name == "mixture"))
        if phase.name == "dense" or phase.progress() < args.long_from:
            ids = ids.view(-1, WINDOW // 2)  # attention is a fifth of the time at full length
        for group in optimizer.param_groups:
            group["lr"] = phase.rate()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = next_token_loss(logits, ids)
        (loss + args.balance * balance.take()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        phase.step += 1
        now = time.monotonic()
        phase.seconds += now - last
        last = now
        if phase.seconds >= next_report or phase.progress() >= 1:
            entry = {
                "step": phase.step,
                "tokens": phase.step * BATCH * WINDOW,
                "minutes": round(phase.seconds / 60, 2),
                "train_loss": round(sum(recent) / len(recent), 4),
                "smallest_share": round(balance.smallest, 4),
                "held_out": held_out_losses(model, held_out),
            }
            phase.log.append(entry)
            print(phase.name, json.dumps(entry), flush=True)
            save_state(path, model, optimizer, phase)
            recent, balance.smallest = [], 1.0
            next_report += 60 * args.report_minutes
        if snapshot_due and phase.seconds >= 60 * args.snapshot_minutes:
            save_model(model, args.out, {"snapshot": phase.log[-1]})
            snapshot_due = False
            print("snapshot written", flush=True)
    return phase


def save_model(model: PreTrainedModel, out: Path, record: dict) -> None:
    """Write bfloat16 shards beside the tokenizer; the folder's weights are replaced whole."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    half.save_pretrained(fresh, max_shard_size="6MB")
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
        path.replace(out / path.name)
    fresh.rmdir()
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def load_stream(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The training tokens of all domains, kept in ``--work`` (encoding takes a minute)."""
    path = args.work / "stream.pt"
    if not path.exists():
        texts = [text for domain in DOMAINS for text in read_texts(args.text, domain)]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed))
        stream = token_stream(tokenizer, [texts[i] for i in order.tolist()])
        torch.save(stream.to(torch.int16), path)
    return torch.load(path, weights_only=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="make_text.py's train folder")
    parser.add_argument("--held-out", type=Path, required=True, help="its calibration folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for training state")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--kind", choices=KINDS, default="mixtral", help="which of the two models")
    parser.add_argument("--restart", action="store_true", help="drop the saved state")
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="no dense phase and no upcycling: the mixture's experts are drawn at random",
    )
    parser.add_argument("--dense-minutes", type=float, default=15)
    parser.add_argument("--mixture-minutes", type=float, default=85)
    parser.add_argument("--dense-steps", type=int, help="instead of minutes")
    parser.add_argument("--mixture-steps", type=int, help="instead of minutes")
    parser.add_argument("--dense-rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--mixture-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--redrawn", type=float, default=0.5, help="share of channels drawn anew")
    parser.add_argument(
        "--long-from",
        type=float,
        default=0.6,
        help="share of the mixture phase after which windows are whole (halved before)",
    )
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balance loss")
    parser.add_argument("--report-minutes", type=float, default=5)
    parser.add_argument("--snapshot-minutes", type=float, default=10, help="into the mixture phase")
    parser.add_argument("--stop-after", choices=("tokenizer", "dense", "mixture"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast; slow without AVX512-BF16")
    parser.add_argument("--experts", default="sorted", help="experts implementation")
    return parser.parse_args()


def main() -> None:
    """Go through the steps."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.restart:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    saved_tokenizer = args.work / "tokenizer"
    if not saved_tokenizer.exists():
        texts = [text for domain in DOMAINS for text in read_texts(args.text, domain)]
        make_tokenizer(texts).save_pretrained(saved_tokenizer)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved_tokenizer)
    tokenizer.save_pretrained(args.out)
    if args.stop_after == "tokenizer":
        return

    stream = load_stream(args, tokenizer)
    print(f"{len(stream)} training tokens", flush=True)
    held_out = {
        domain: windows_of(token_stream(tokenizer, read_texts(args.held_out, domain)))
        for domain in DOMAINS
    }
    held_out = {domain: windows[:HELD_OUT_WINDOWS] for domain, windows in held_out.items()}
    torch.manual_seed(args.seed)
    kind = KINDS[args.kind]
    dense_phase = None
    if args.from_scratch:
        mixture = kind.mixture()
    else:
        dense = kind.dense()
        # The dense rate falls to half only: the mixture takes over from a model still learning.
        plan = Phase("dense", args.dense_minutes, args.dense_steps, args.dense_rate, 0.5)
        dense_phase = train(dense, plan, stream, held_out, args)
        if args.stop_after == "dense":
            return
        mixture = upcycle(dense, kind, args.redrawn, args.seed)
    mixture.set_experts_implementation(args.experts)
    plan = Phase("mixture", args.mixture_minutes, args.mixture_steps, args.mixture_rate, 0.03)
    mixture_phase = train(mixture, plan, stream, held_out, args)
    record = {
        "options": {key: str(value) for key, value in vars(args).items() if key not in PATHS},
        "training_text_sha256": {
            domain: hashlib.sha256((args.text / f"{domain}.jsonl").read_bytes()).hexdigest()
            for domain in DOMAINS
        },
        "training_tokens": len(stream),
        "parameters": sum(p.numel() for p in mixture.parameters()),
        "dense": asdict(dense_phase) if dense_phase else None,
        "mixture": asdict(mixture_phase),
    }
    save_model(mixture, args.out, record)


PATHS = ("text", "held_out", "work", "out")

if __name__ == "__main__":
    main()
