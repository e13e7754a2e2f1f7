"""What is counted from headers and terms equals what the model and its files hold."""

from __future__ import annotations

import families
import pytest
import torch
from mctk.checkpoint import (
    Source,
    active_parameters,
    count,
    experts_per_token,
    macs,
    original_terms,
)
from mctk.errors import UserError
from mctk.models import BankSite, bank_sites
from mctk.sweep import StreamedModel
from mctk.terms import BankShape, Bias, Dense, LowRank, Sparse
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
    assert before.macs_per_token - after.macs_per_token == K * (I * H - 3 * (I + H))


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


def test_active_parameters_of_shared_slots():
    shape = BankShape(4, 6, 8)
    base = Dense(shape, [0] * 4, torch.zeros(1, 6, 8))
    assert active_parameters(base, 2) == 48
    assert macs(base, 2) == 96
    groups = Dense(shape, [0, 0, 1, None], torch.zeros(2, 6, 8))
    assert active_parameters(groups, 1) == 48
    assert active_parameters(groups, 3) == 96
    assert macs(groups, 2) == 2 * 3 * 48 // 4  # the mean over members: one is absent
    low = LowRank(shape, range(4), [0] * 4, U=torch.zeros(4, 6, 2), V=torch.zeros(1, 2, 8))
    assert active_parameters(low, 2) == 2 * 12 + 16
    assert active_parameters(Bias(shape, [None, 0, None, None], torch.zeros(1, 6)), 2) == 6
    sparse = Sparse(shape, range(4), torch.zeros(4, 5), torch.arange(20).view(4, 5).int())
    assert active_parameters(sparse, 2) == 10


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
