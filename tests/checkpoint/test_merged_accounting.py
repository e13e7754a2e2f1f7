"""Merged experts count once per token and group, as the run time computes them."""

from __future__ import annotations

import itertools

import families
import pytest
import torch
import torch.nn.functional as F
from mctk.checkpoint import Source, bank_macs, count, expert_macs, experts_per_token
from mctk.models import BankSite, bank_sites
from mctk.runtime import TermExperts, merged_groups
from mctk.sweep import StreamedModel
from mctk.terms import BankShape, Dense, LowRank

H, I, E, K = 32, 24, 4, 2  # noqa: E741
SLOTS = (0, 0, 1, 1)
# Of the six pairs of experts two lie in one group: 10 rows instead of 12.
ROWS = 10


def shapes():
    wide = BankShape(E, I, H)
    return {"gate": wide, "up": wide, "down": BankShape(E, H, I)}


def dense(slots=SLOTS):
    return {
        part: [Dense(s, slots, torch.zeros(max(slots) + 1, s.out_features, s.in_features))]
        for part, s in shapes().items()
    }


def low_rank():
    """V of all experts is one, U is each group's."""
    return {
        part: [
            LowRank(s, SLOTS, [0] * E, U=torch.zeros(2, s.out_features, 3),
                    V=torch.zeros(1, 3, s.in_features))
        ]
        for part, s in shapes().items()
    }  # fmt: skip


def multiplied(monkeypatch, terms, norm=False):
    """Multiply-adds of a run in which every set of experts is routed to once."""
    original = families.tiny("mixtral").model.layers[0].mlp.experts
    if norm:
        original.has_post_expert_norm = True
        original.post_expert_norm = torch.nn.Identity()
    experts = TermExperts(original, {p: [t.spec() for t in bank] for p, bank in terms.items()})
    for part, bank in terms.items():
        experts.set_terms(part, bank)
    done = []
    linear, addmm = F.linear, torch.Tensor.addmm_

    def counting(x, weight, *bias):
        done.append(x.shape[0] * weight.numel())
        return linear(x, weight, *bias)

    def adding(self, left, right, **more):
        done.append(left.shape[0] * right.numel())
        return addmm(self, left, right, **more)

    monkeypatch.setattr(F, "linear", counting)
    monkeypatch.setattr(torch.Tensor, "addmm_", adding)
    index = torch.tensor(list(itertools.combinations(range(E), K)))
    experts(torch.zeros(len(index), H), index, torch.ones(len(index), K))
    layer = torch.nn.Module()
    layer.experts = original
    return sum(done), len(index), layer


@pytest.mark.parametrize("make", [dense, low_rank])
@pytest.mark.parametrize("norm", [False, True])
def test_macs_are_those_of_the_run(monkeypatch, make, norm):
    terms = make()
    done, sets, layer = multiplied(monkeypatch, terms, norm)
    merged = merged_groups(terms)
    assert merged == (0, 0, 2, 2)
    counted = sum(
        bank_macs(
            layer, BankSite(f"experts.{p}", "experts", p, shapes()[p], False), bank, K, merged
        )
        for p, bank in terms.items()
    )
    assert done == sets * counted
    if make is dense:
        assert done == ROWS * 3 * H * I


def test_plans_and_files_count_merged_experts(tmp_path):
    families.tiny("mixtral").save_pretrained(tmp_path, max_shard_size="40KB")
    model = StreamedModel(Source(tmp_path))
    k = experts_per_token(model.config)
    changed = {
        index: {f"experts.{part}": bank for part, bank in dense().items()}
        for index in range(len(model.layers))
    }
    assert set(changed[0]) <= set(bank_sites(model.layers[0]))
    before = expert_macs(model.layers, k, {})
    assert before / expert_macs(model.layers, k, changed) == pytest.approx(12 / ROWS)
    sizes = count(model.source, model.weights, model.layers, model.layers_path, k, 0, changed)
    plain = count(model.source, model.weights, model.layers, model.layers_path, k, 0, {})
    layers, expert = len(model.layers), 3 * H * I
    assert plain.parameters - sizes.parameters == layers * 2 * expert
    assert plain.active_parameters - sizes.active_parameters == layers * 2 * expert // 6
    assert plain.macs_per_token - sizes.macs_per_token == layers * 2 * expert // 6


def test_experts_in_a_list_are_computed_call_by_call():
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = torch.nn.Linear(H, I, bias=False)
            self.up_proj = torch.nn.Linear(H, I, bias=False)
            self.down_proj = torch.nn.Linear(I, H, bias=False)

    layer = torch.nn.Module()
    layer.experts = torch.nn.ModuleList([Expert() for _ in range(E)])
    site = BankSite("experts.up", "experts", "up", shapes()["up"], False)
    assert bank_macs(layer, site, dense()["up"], K, merged_groups(dense())) == K * H * I
