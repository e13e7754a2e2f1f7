"""What is counted from headers and terms equals what the model and its files hold."""

from __future__ import annotations

import itertools
from fractions import Fraction

import families
import pytest
import torch
import torch.nn.functional as F
from mctk.checkpoint import (
    Source,
    active_parameters,
    bank_macs,
    count,
    expert_macs,
    experts_per_token,
    macs,
    original_terms,
    visited,
)
from mctk.errors import UserError
from mctk.models import BankSite, bank_sites
from mctk.runtime import TermExperts, role
from mctk.sweep import StreamedModel
from mctk.terms import BankShape, Bias, Dense, DynamicDense, LowRank, Sparse
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

H, I, V, E, K = 32, 24, families.VOCABULARY, 4, 2  # noqa: E741
ATTENTION = 32 * 32 + 2 * 16 * 32 + 32 * 32  # q, k and v, o


def streamed(path, family, **changes):
    model = families.tiny(family, **changes)
    model.save_pretrained(path, max_shard_size="40KB")
    return model, StreamedModel(Source(path))


def counted(model: StreamedModel, changed=None):
    k = experts_per_token(model.config)
    return count(
        model.source, model.weights, model.layers, model.layers_path, k, H * V, changed or {}
    )


@pytest.mark.parametrize("family", [*families.FAMILIES, "llama"])
def test_the_original_is_counted_as_it_is(tmp_path, family):
    model, opened = streamed(tmp_path, family)
    sizes = counted(opened)
    # deepseek_v3 and glm4_moe keep their router's correction in a buffer that is stored.
    stored = {
        t.data_ptr(): t for n, t in model.state_dict(keep_vars=True).items() if "inv_freq" not in n
    }
    assert sizes.parameters == sum(t.numel() for t in stored.values())
    assert sizes.bytes == sum(t.numel() * t.element_size() for t in stored.values())
    assert sizes.bytes == opened.source.nbytes
    experts = [m for m in model.modules() if hasattr(m, "is_transposed")]
    routed = sum(p.numel() for m in experts for p in m.parameters())
    assert sizes.expert_parameters == routed
    k, members = (experts_per_token(model.config), experts[0].num_experts) if experts else (1, 1)
    assert sizes.active_parameters == sizes.parameters - routed + routed * k // members


def test_a_tied_head_that_is_stored_twice_counts_once(tmp_path):
    model, opened = streamed(tmp_path / "a", "granitemoe")
    once = counted(opened)
    assert once.parameters == sum(p.numel() for p in model.parameters())
    (tmp_path / "b").mkdir()
    tensors = {}
    for file in opened.source.files:
        tensors |= load_file(tmp_path / "a" / file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    assert counted(StreamedModel(Source(tmp_path / "b"))) == once


def test_mixtral_by_hand(tmp_path):
    sizes = counted(streamed(tmp_path, "mixtral")[1])
    expert = 3 * H * I
    norms = 2 * 2 * H + H
    assert sizes.parameters == 2 * V * H + 2 * (ATTENTION + E * H + E * expert) + norms
    assert sizes.active_parameters == 2 * V * H + 2 * (ATTENTION + E * H + K * expert) + norms
    assert sizes.macs_per_token == V * H + 2 * (ATTENTION + E * H + K * expert)
    assert sizes.expert_parameters == 2 * E * expert


def test_qwen2_moe_by_hand(tmp_path):
    sizes = counted(streamed(tmp_path, "qwen2_moe")[1])
    expert, shared = 3 * H * I, 3 * H * 20
    biases = 32 + 2 * 16
    norms = 2 * 2 * H + H
    layer = ATTENTION + E * H + H + shared  # router and the shared expert's gate
    assert sizes.active_parameters == 2 * V * H + 2 * (layer + biases + K * expert) + norms
    assert sizes.macs_per_token == V * H + 2 * (layer + K * expert)


def test_changed_modules_replace_their_tensors(tmp_path):
    _, opened = streamed(tmp_path, "gpt_oss")
    before = counted(opened)
    sites = bank_sites(opened.layers[1])
    shape = sites["experts.up"].shape
    every = range(E)
    low = LowRank(shape, every, [0] * E, U=torch.zeros(E, I, 3).bfloat16(),
                  V=torch.zeros(1, 3, H).bfloat16())  # fmt: skip
    banks = {
        name: original_terms(sites[name], torch.float32)
        for name in ("experts.gate", "experts.up", "experts.down")
    }
    banks["experts.up"] = [low]
    after = counted(opened, {1: banks})
    saved = E * I * H + E * I  # the weights of up, and its biases
    assert before.parameters - after.parameters == saved - low.parameters()
    assert before.bytes - after.bytes == 4 * saved - 2 * low.parameters()
    met = K * I * 3 + 3 * H  # V is shared: it is met once
    assert before.active_parameters - after.active_parameters == K * (I * H + I) - met
    assert before.macs_per_token - after.macs_per_token == K * I * H - 3 * (K * I + H)


def test_a_bank_without_any_term_counts_nothing(tmp_path):
    _, opened = streamed(tmp_path, "mixtral")
    before = counted(opened)
    sites = bank_sites(opened.layers[0])
    banks = {
        name: original_terms(site, torch.float32)
        for name, site in sites.items()
        if name.startswith("experts")
    }
    after = counted(opened, {0: {**banks, "experts.down": []}})
    gone = E * H * I
    assert before.parameters - after.parameters == gone
    assert before.expert_parameters - after.expert_parameters == gone
    assert before.macs_per_token - after.macs_per_token == K * H * I


def test_how_many_slots_a_token_meets():
    assert visited([0, 0, 0, 0], 2) == {0: 1}
    assert visited([0, 1, 2, 3], 2) == dict.fromkeys(range(4), Fraction(1, 2))
    assert visited([None, 0, None, None], 2) == {0: Fraction(1, 2)}
    # Of the ten pairs of five members, nine hold one of the first three, seven one of the others.
    assert visited([0, 0, 0, 1, 1], 2) == {0: Fraction(9, 10), 1: Fraction(7, 10)}
    assert visited([0, 0, 0, 1, 1], 3) == {0: 1, 1: Fraction(9, 10)}
    for slots in ([0, 0, 1, 2, None, 1], [0, 1, 0, 1, 2, 2]):
        for k in range(1, 7):
            chosen = list(itertools.combinations(slots, k))
            for slot, chance in visited(slots, k).items():
                assert chance == Fraction(sum(slot in c for c in chosen), len(chosen))


def test_active_parameters_of_shared_slots():
    shape = BankShape(4, 6, 8)
    base = Dense(shape, [0] * 4, torch.zeros(1, 6, 8))
    assert active_parameters(base, 2) == 48
    groups = Dense(shape, [0, 0, 1, None], torch.zeros(2, 6, 8))
    assert active_parameters(groups, 1) == 36  # half of the tokens one, a quarter the other
    assert active_parameters(groups, 3) == 48 + 36
    low = LowRank(shape, range(4), [0] * 4, U=torch.zeros(4, 6, 2), V=torch.zeros(1, 2, 8))
    assert active_parameters(low, 2) == 2 * 12 + 16
    assert active_parameters(low.pivot(), 2) == 2 * 12 + 12
    assert active_parameters(Bias(shape, [None, 0, None, None], torch.zeros(1, 6)), 2) == 3
    sparse = Sparse(shape, range(4), torch.zeros(4, 5), torch.arange(20).view(4, 5).int())
    assert active_parameters(sparse, 2) == 10
    skipped = DynamicDense(
        shape, [0] * 4, torch.zeros(1, 6, 8), drop=3, axis="cols", energy=torch.zeros(1, 8)
    )
    assert active_parameters(skipped, 2) == 6 * 5 + 8


def test_macs_of_what_is_shared():
    shape = BankShape(4, 6, 8)
    base = Dense(shape, [0] * 4, torch.zeros(1, 6, 8))
    assert macs(base, 2) == 96  # every member by itself
    assert macs(base, 2, role(base, "up")) == 48
    groups = Dense(shape, [0, 0, 1, None], torch.zeros(2, 6, 8))
    assert macs(groups, 2) == 2 * 3 * 48 // 4  # the mean over members: one is absent
    assert macs(groups, 2, role(groups, "down")) == 48 * 5 // 6 + 48 // 2
    own = Dense(shape, range(4), torch.zeros(4, 6, 8))
    assert macs(own, 2, role(own, "up")) == macs(own, 2) == 96
    low = LowRank(shape, range(4), [0] * 4, U=torch.zeros(4, 6, 2), V=torch.zeros(1, 2, 8))
    assert macs(low, 2, role(low, "up")) == 16 + 2 * 12
    assert macs(low, 2, role(low, "down")) == 2 * (16 + 12)  # V meets each expert's own values
    left = LowRank(shape, [0] * 4, range(4), U=torch.zeros(1, 6, 2), V=torch.zeros(4, 2, 8))
    assert macs(left, 2, role(left, "up")) == 2 * (16 + 12)
    assert macs(left, 2, role(left, "down")) == 2 * 16 + 12
    both = LowRank(shape, [0] * 4, [0] * 4, U=torch.zeros(1, 6, 2), V=torch.zeros(1, 2, 8))
    assert macs(both, 2, role(both, "up")) == 16 + 12


@pytest.mark.parametrize("part", ["gate", "up", "down"])
@pytest.mark.parametrize("slots", [[0] * 4, [0, 1, 1, 0], [0, 0, 1, None], [0, 1, 2, 3]])
def test_macs_are_those_of_the_run(monkeypatch, part, slots):
    """Every set of experts is routed to once: what is multiplied is what is counted."""
    module = bare_experts_of_mixtral()
    wide = BankShape(4, I, H)
    shape = BankShape(4, H, I) if part == "down" else wide
    term = Dense(shape, slots, torch.zeros(4, shape.out_features, shape.in_features))
    terms = {name: [] for name in ("gate", "up", "down")} | {part: [term]}
    experts = TermExperts(module, {p: [t.spec() for t in bank] for p, bank in terms.items()})
    for name, bank in terms.items():
        experts.set_terms(name, bank)
    rows = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, w: (rows.append(len(x)), linear(x, w))[1])
    index = torch.tensor(list(itertools.combinations(range(4), K)))
    experts(torch.zeros(len(index), H), index, torch.ones(len(index), K))
    assert sum(rows) * H * I == len(index) * macs(term, K, role(term, part))


def bare_experts_of_mixtral():
    return families.tiny("mixtral").model.layers[0].mlp.experts


def test_speed_bound_of_a_base_and_deltas(tmp_path):
    """The issue's formula k / (p + k rho), for p = 1."""
    _, opened = streamed(tmp_path, "mixtral")
    rank, changed = 6, {}
    for index, layer in enumerate(opened.layers):
        changed[index] = {}
        for name, site in bank_sites(layer).items():
            if name.startswith("experts"):
                s = site.shape
                base = Dense(s, [0] * E, torch.zeros(1, s.out_features, s.in_features))
                U, V = torch.zeros(E, s.out_features, rank), torch.zeros(E, rank, s.in_features)
                changed[index][name] = [base, LowRank(s, range(E), range(E), U=U, V=V)]
    rho = rank * (H + I) / (H * I)
    before, after = (expert_macs(opened.layers, K, c) for c in ({}, changed))
    assert before / after == pytest.approx(K / (1 + K * rho))
    sizes = counted(opened, changed)
    assert counted(opened).macs_per_token - sizes.macs_per_token == before - after


def test_down_below_a_norm_is_computed_by_expert():
    layer = torch.nn.Module()
    layer.experts = bare_experts_of_mixtral()
    layer.experts.has_post_expert_norm = True
    shape = BankShape(4, H, I)
    base = Dense(shape, [0] * 4, torch.zeros(1, H, I))
    down = BankSite("experts.down", "experts", "down", shape, False)
    assert bank_macs(layer, down, [base], K) == K * H * I
    layer.experts.has_post_expert_norm = False
    assert bank_macs(layer, down, [base], K) == H * I


def test_original_terms_are_on_meta():
    site = BankSite("x", "m", "linear", BankShape(1, 3, 5), True)
    dense, bias = original_terms(site, torch.bfloat16)
    assert dense.tensors()["weight"].is_meta
    assert (dense.parameters(), bias.parameters(), bias.nbytes()) == (15, 3, 6)


def test_experts_per_token_of_a_configuration():
    assert experts_per_token(families.tiny_config("deepseek_v3")) == 2
    config = AutoConfig.for_model("llama")
    assert experts_per_token(config) == 1
    config.num_experts = 4
    with pytest.raises(UserError, match=r"num_experts is 4, but nothing says how many"):
        experts_per_token(config)
    config.moe_topk = [3, 3]
    assert experts_per_token(config) == 3
