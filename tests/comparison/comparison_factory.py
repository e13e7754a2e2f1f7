"""A comparison as a real one looks, without running one: 20 methods, 3 budgets, rounding rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from mctk.comparison.result import (
    SCHEMA,
    Average,
    BankSize,
    Budget,
    Calibration,
    Comparison,
    Divergence,
    Flag,
    Interval,
    Model,
    Original,
    Overall,
    Row,
    Scope,
    Sizes,
    Speed,
    StepText,
    TaskScore,
    TextScore,
    TracePoint,
)

LAYERS, EXPERTS, WINDOWS, TOKENS = 4, 8, 32, 511
TEXTS = {"wordnet": 3.62, "docs": 2.47, "code": 2.13, "bible": 3.31}  # nats a token
REMOVED = (0.2, 0.4, 0.6)
PARAMETERS, OUTSIDE = 10_630_848, 1_193_664
IN_EXPERTS = PARAMETERS - OUTSIDE
# Name, methods, log-perplexity lost at 20, 40 and 60 % (None: it failed).
METHODS: list[tuple[str, list[str], tuple[float | None, ...]]] = [
    ("SVD", ["decompose/svd"], (0.21, 0.71, 1.72)),
    ("FWSVD", ["decompose/fwsvd"], (0.17, 0.55, 1.31)),
    ("ASVD", ["decompose/asvd"], (0.14, 0.46, 1.14)),
    ("SVD-LLM", ["decompose/svd_llm"], (0.019, 0.088, 0.31)),
    ("SVD-LLM, update", ["decompose/svd_llm"], (0.018, 0.085, 0.30)),
    ("SVD-LLM V2", ["decompose/svd_llm_v2"], (0.016, 0.082, 0.29)),
    (
        "D²-MoE",
        ["merge/fisher", "decompose/delta_svd", "prune/semi_dynamic"],
        (0.011, 0.052, 0.19),
    ),
    ("D²-MoE, shared V", ["merge/fisher", "decompose/delta_svd"], (0.013, 0.063, 0.22)),
    ("ResMoE (UP)", ["merge/barycenter", "prune/residual"], (0.052, 0.20, 0.61)),
    ("ResMoE (SVD)", ["merge/barycenter", "decompose/residual_svd"], (0.071, 0.25, 0.72)),
    ("NAEE", ["prune/naee"], (0.085, 0.29, 0.83)),
    ("NAEE, progressive", ["prune/naee_progressive"], (0.084, 0.28, 0.80)),
    ("Random experts", ["prune/random"], (0.31, 0.98, 2.6)),
    ("Frequency", ["prune/frequency"], (0.12, 0.37, 1.02)),
    ("Router weight", ["prune/router_weight"], (0.121, 0.372, 1.01)),
    ("EAN", ["prune/ean"], (0.098, 0.33, 0.92)),
    ("REAP", ["prune/reap"], (0.082, 0.275, 0.79)),
    ("MoNE", ["prune/mone"], (0.064, 0.21, 0.66)),
    ("M-SMoE", ["merge/m_smoe"], (0.26, 0.81, 1.9)),
    ("HC-SMoE", ["merge/hc_smoe"], (0.19, 0.66, None)),
    ("Wanda", ["prune/wanda"], (0.006, 0.057, 0.41)),
    ("Channels", ["prune/channels"], (0.041, 0.17, 0.52)),
    ("D²-MoE, 4 bits", ["merge/fisher", "decompose/delta_svd", "quantize/rtn"], (0.021, 0.06, 0.2)),
    ("NAEE, 4 bits", ["prune/naee", "quantize/rtn"], (0.09, 0.295, 0.84)),
]
# Bits, log-perplexity lost: rounding without a budget.
ROUNDING = ((8, 0.00008), (4, 0.0105), (3, 0.061), (2, 0.92))
NATIVE = {
    "NAEE",
    "NAEE, progressive",
    "Random experts",
    "Frequency",
    "Router weight",
    "EAN",
    "REAP",
}
COARSE = {*NATIVE, "NAEE, 4 bits", "M-SMoE", "HC-SMoE"}


def comparison(tasks: bool = True, speed: bool = True, structure: bool = True, seeds: int = 1):
    """A finished comparison of the demo's shape."""
    rng = np.random.default_rng(0)
    base = {name: 511 * nll * np.exp(rng.normal(0, 0.1, WINDOWS)) for name, nll in TEXTS.items()}
    original = Original(
        sizes=_sizes(1.0, 2.0, active=1.0),
        texts={name: _text(name, base[name], None, rng, original=True) for name in TEXTS},
        overall=_overall({name: _text(name, base[name], None, rng, True) for name in TEXTS}),
        tasks=_tasks(0.0, rng) if tasks else {},
        average=_average(0.0) if tasks else None,
        speed=_speed(1.0) if speed else None,
        peak_memory_bytes=812_000_000 if speed else None,
    )
    budgets = [Budget(remove, "experts") for remove in REMOVED]
    rows = [
        _row(name, steps, budget, lost[at], seed, base, rng, tasks, speed)
        for name, steps, lost in METHODS
        for at, budget in enumerate(budgets)
        for seed in range(seeds)
    ]
    for bits, lost in ROUNDING:
        rows.append(
            _row(
                f"{bits} bits", ["quantize/rtn"], None, lost, 0, base, rng, tasks, speed, bits=bits
            )
        )
    return Comparison(
        schema=SCHEMA,
        name="compare_demo",
        model=Model(
            "demo/model", "/models/demo", "mixtral", LAYERS, EXPERTS, 2, "5f" * 32, "apache-2.0"
        ),
        dtype="float32",
        device="cpu",
        calibrations=[
            Calibration(seed, "ab" * 32, 256, 512, ["wordnet.jsonl", "docs.jsonl", "code.jsonl"])
            for seed in range(seeds)
        ],
        original=original,
        budgets=budgets,
        rows=rows,
        texts=list(TEXTS),
        tasks=["hellaswag", "arc_easy", "piqa"] if tasks else [],
        protocols=[
            "token_ppl/v1 window=512 stride=512",
            "token_kl/v1 window=512 tokens=8176",
            "speed/v1 batch=4 prompt=256 new=64",
        ],
        seconds={"calibrate": 74.2, "evaluate original": 9.1, "total": 1003.0},
        statistics={"sweeps": 2, "cache_hits": 0, "cache_misses": 96},
        structure=structure_of(rng) if structure else None,
        versions={"mctk": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11.2"},
        command="mctk compare recipes/compare_demo.yaml",
        source="# the demo's table\nmodel: demo/model\nbudgets: [0.2, 0.4, 0.6]\n",
        finished=True,
        made="2026-11-27T15:00:00Z",
    )


def _sizes(share: float, width: float, active: float) -> Sizes:
    stored = round(IN_EXPERTS * share)
    outside = OUTSIDE * 2
    payload = round(stored * width)
    work = round(3_552_000 * active)
    return Sizes(OUTSIDE + stored, work, outside + payload, work - 786_432, stored, payload)


def _text(name, base, lost, rng, original=False) -> TextScore:
    nll = base if original else base + TOKENS * lost * np.exp(rng.normal(0, 0.25, base.size))
    total = float(nll.sum() / (TOKENS * WINDOWS))
    change = divergence = None
    if not original:
        difference = (nll - base) / TOKENS
        half = 1.96 * float(difference.std()) / math.sqrt(WINDOWS)
        mean = float(difference.mean())
        change = Interval(mean, mean - half, mean + half)
        kl = 0.9 * lost + 0.002
        agreement = 1 - min(0.9, 0.28 * math.sqrt(lost))
        divergence = Divergence(
            Interval(kl, 0.9 * kl, 1.1 * kl),
            Interval(agreement, agreement - 0.01, agreement + 0.01),
            8176,
            "token_kl/v1 window=512 tokens=8176",
        )
    return TextScore(
        perplexity=math.exp(total),
        nll=total,
        tokens=TOKENS * WINDOWS,
        windows=WINDOWS,
        protocol="token_ppl/v1 window=512 stride=512",
        digest=name * 4,
        change=change,
        divergence=divergence,
        window_nll=nll.tolist(),
    )


def _overall(texts: dict[str, TextScore]) -> Overall:
    """All texts together; the interval is left to the paired bootstrap of the windows."""
    nll = sum(text.nll or 0.0 for text in texts.values()) / len(texts)
    far = [text.divergence for text in texts.values() if text.divergence]
    if not far:
        return Overall(math.exp(nll))
    kl = sum(one.kl.value for one in far if one.kl) / len(far)
    agreement = sum(one.agreement.value for one in far) / len(far)
    together = Divergence(
        Interval(kl), Interval(agreement), sum(one.tokens for one in far), far[0].protocol
    )
    return Overall(math.exp(nll), None, together)


def _tasks(lost: float, rng) -> dict[str, TaskScore]:
    found = {}
    for name, full, chance in (
        ("hellaswag", 0.39, 0.25),
        ("arc_easy", 0.44, 0.25),
        ("piqa", 0.61, 0.5),
    ):
        value = chance + (full - chance) * math.exp(-2 * lost) + float(rng.normal(0, 0.004))
        found[name] = TaskScore("acc_norm", value, 0.011, chance, lost > 1.6, 2000, 1.0, 0)
    return found


def _average(lost: float) -> Average:
    chance = (0.25 + 0.25 + 0.5) / 3
    return Average(
        chance + (0.48 - chance) * math.exp(-2 * lost), chance, ["hellaswag", "arc_easy", "piqa"]
    )


def _speed(factor: float) -> Speed:
    middle = 1800 * factor
    return Speed(
        Interval(middle, 0.94 * middle, 1.04 * middle),
        Interval(96 * factor, 90 * factor, 99 * factor),
        "speed/v1 batch=4 prompt=256 new=64",
    )


def _row(name, methods, budget, lost, seed, base, rng, tasks, speed, bits=None) -> Row:
    steps = [StepText(method, 1, ["experts.*"], "all", None, {}) for method in methods]
    steps[0] = StepText(methods[0], 2, ["experts.*"], "all", "auto", {"storage": "pivoted"})
    stages = list(dict.fromkeys(method.split("/")[0] for method in methods))
    key = f"{name}-{budget.remove if budget else 'own'}-{seed}".replace(" ", "_")
    common: dict[str, Any] = {
        "name": name,
        "label": name,
        "family": "+".join(stages),
        "key": key,
        "steps": steps,
        "chain": " → ".join(f"{step.method} v{step.version}" for step in steps),
        "allocate": "allocate/uniform v1",
        "budget": budget,
        "seed": seed,
        "path": f"runs/compare_demo/{key}",
        "output_kind": "native" if name in NATIVE else "mctk",
    }
    if lost is None:
        reason = "layer 2: experts.gate has 3 groups left <merging needs at least 4>"
        return Row(**common, status="failed", reason=reason)
    lost = lost * float(np.exp(rng.normal(0, 0.04 if seed else 0.0)))
    flags = []
    share = 1.0 if budget is None else 1 - budget.remove - float(rng.uniform(0, 0.004))
    if budget and name in COARSE:
        share = math.floor(8 * share) / 8
        flags.append(Flag("coarse", f"8 experts: {share:.1%} is stored, the next smaller size"))
    width = 2.0
    if methods[-1] == "quantize/rtn":
        width = (bits or 4) / 8 + 2 / 64
        flags.append(Flag("bytes", "its terms are packed: compare it by bytes"))
    if name == "Wanda":
        width = 2.0 + 1 / 8 / share
    if "progressive" in name or name == "Wanda":
        common["propagate"] = "compressed"
        flags.append(Flag("sequential", "calibrated on its own compressed prefix"))
    sizes = _sizes(share, width, active=0.2 + 0.8 * share)
    texts = {
        text: _text(text, base[text], lost * factor, rng)
        for text, factor in zip(TEXTS, (1.2, 0.9, 0.8, 1.1), strict=True)
    }
    full = 192 * 512
    return Row(
        **common,
        status="ok",
        sizes=sizes,
        scope=Scope(
            "experts",
            "parameters",
            IN_EXPERTS,
            None if budget is None else round(IN_EXPERTS * (1 - budget.remove)),
            sizes.expert_parameters,
        ),
        texts=texts,
        overall=_overall(texts),
        tasks=_tasks(lost, rng) if tasks else {},
        average=_average(lost) if tasks else None,
        speed=_speed(1 + 0.3 * (1 - share)) if speed else None,
        peak_memory_bytes=round(7e8 + sizes.bytes) if speed else None,
        seconds={
            "compress": float(rng.uniform(2, 40)),
            "gate": 1.2,
            "evaluate": float(rng.uniform(8, 12)),
        },
        trace=[
            TracePoint(layer, step, 0.25 * lost * (1 + 0.4 * layer) * (0.6 + 0.4 * at))
            for layer in range(LAYERS)
            for at, step in enumerate([*methods, "as stored"])
        ],
        banks=[
            BankSize(
                layer,
                f"experts.{part}",
                round(139 * share * (1 + 0.2 * (layer - 1.5) * (part == "down")))
                if any(m.startswith("decompose") for m in methods)
                else None,
                f"lowrank r={round(139 * share)}"
                if any(m.startswith("decompose") for m in methods)
                else "dense",
                round(8 * full * share),
                round(8 * full * share * width),
                8 * full,
                lost / 3,
            )
            for layer in range(LAYERS)
            for part in ("gate", "up", "down")
        ],
        flags=flags,
        fingerprint="cd" * 32,
    )


def structure_of(rng) -> dict[str, Any]:
    """What `mctk.comparison.structure` finds, for a model of the demo's shape."""
    grid = [i / 32 for i in range(33)]
    routing = {}
    for name in ["calibration", *TEXTS]:
        shares = rng.dirichlet(np.full(EXPERTS, 4.0), LAYERS)
        routing[name] = {"tokens": 8192, "shares": shares.tolist()}
    matrices = []
    for layer in range(LAYERS):
        raw = rng.uniform(0.25, 0.75, (EXPERTS, EXPERTS)) * 0.88**layer
        matrices.append(((raw + raw.T) / 2 * (1 - np.eye(EXPERTS)) + np.eye(EXPERTS)).tolist())
    banks = {}
    for number, part in enumerate(("gate", "up", "down")):
        lines = []
        for layer in range(LAYERS):
            fall = 2.2 + 0.3 * number + 0.1 * layer
            kept = [1 - (1 - x) ** fall for x in grid]
            deltas = [1 - (1 - x) ** (fall + 0.8) for x in grid]
            line = {"layer": layer, "experts": kept, "deltas": deltas, "matrices": 8}
            lines.append({**line, "delta_energy": 0.7 - 0.05 * layer})
        banks[f"experts.{part}"] = lines
    return {
        "version": 1,
        "layers": list(range(LAYERS)),
        "experts": [EXPERTS] * LAYERS,
        "routing": routing,
        "similarity": {"layers": list(range(LAYERS)), "tokens": 1024, "cka": matrices},
        "spectra": {"grid": grid, "banks": banks},
    }
