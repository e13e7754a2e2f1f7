"""Dynamic expert skipping as modules run it."""

from __future__ import annotations

import pytest
import torch
from compression import exact_terms
from mctk.errors import CheckpointError
from mctk.runtime import dynamic_pruning, observe, swap
from mctk.terms import Dense, ExpertSkip
from test_runtime_merged import counts, merged_terms
from test_runtime_shared import LAYOUTS, assert_equal, compressed, inputs, original, plain
from test_runtime_shared import random_terms as shared_terms

POLICY = ([0.7], [0.5, 0.5])


def with_policy(terms, ratios=POLICY[0], shares=POLICY[1]):
    down = terms["down"]
    return {**terms, "down": [*down, ExpertSkip(down[0].shape, ratios, shares)]}


def by_hand(module, x, index, weights):
    """The same with the skipped choice's weight at 0 and the other's at the sum of both."""
    best = weights.max(1, keepdim=True).values
    skipped = (weights < 0.7 * best) & (weights < best)
    left = torch.where(skipped, 0.0, weights)
    left = left * (weights.sum(1, keepdim=True) / left.sum(1, keepdim=True))
    assert bool(skipped.any()) and not bool(skipped.any(1).all())
    return module(x, index, left), skipped


@pytest.mark.parametrize("mixture", ["exact", "base and deltas", "shared factors", "merged"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_choice_weighs_nothing(layout, mixture):
    module = original(layout).double()
    terms = (
        exact_terms(module) if mixture == "exact" else shared_terms(module, mixture, torch.float64)
    )
    without = compressed(module, terms)
    x, index, weights = inputs(without)
    k = index.shape[1]
    skipping = compressed(module, with_policy(terms, [0.7] * (k - 1), [1 / k] * k))
    given = x.double(), index, weights.double()
    expected, _ = by_hand(without, *given)
    assert_equal(skipping(*given), expected, 1e-12)
    assert_equal(plain(skipping, *given), expected, 1e-12)
    with dynamic_pruning(skipping, False):
        assert torch.equal(skipping(*given), without(*given))
    assert torch.equal(skipping(*(t[:0] for t in given)), given[0][:0])


def test_a_token_depends_on_nothing_else_in_the_batch():
    module = original("mixtral").double()
    experts = compressed(module, with_policy(exact_terms(module)))
    x, index, weights = (t.double() if t.is_floating_point() else t for t in inputs(experts))
    together = experts(x, index, weights)
    for row in range(len(x)):
        one = slice(row, row + 1)
        assert_equal(experts(x[one], index[one], weights[one]), together[one], 1e-12)


def test_skipped_choices_are_not_computed(monkeypatch):
    module = original("mixtral").double()
    terms = exact_terms(module)
    experts = compressed(module, with_policy(terms))
    x, index, weights = (t.double() if t.is_floating_point() else t for t in inputs(experts))
    _, skipped = by_hand(compressed(module, terms), x, index, weights)
    rows = counts(monkeypatch)(experts)
    experts(x, index, weights)
    assert sum(rows) == index.numel() - int(skipped.sum())
    seen = []
    with observe(experts, lambda e, token, slot, *_: seen.append(token * 2 + slot)):
        experts(x, index, weights)
    assert sorted(torch.cat(seen).tolist()) == (~skipped).reshape(-1).nonzero()[:, 0].tolist()


def test_merged_experts_and_skipping_go_together():
    module = original("mixtral").double()
    terms = merged_terms(module, "groups")
    experts = compressed(module, with_policy(terms))
    x, index, weights = (t.double() if t.is_floating_point() else t for t in inputs(experts))
    expected, _ = by_hand(compressed(module, terms), x, index, weights)
    assert_equal(experts(x, index, weights), expected, 1e-12)


def test_what_is_refused():
    module = original("mixtral")
    terms = exact_terms(module)
    twice = with_policy(with_policy(terms))
    with pytest.raises(CheckpointError, match=r"terms.down\[2\]: a second skip term"):
        compressed(module, twice)
    shape = terms["up"][0].shape
    wrong = {**terms, "up": [*terms["up"], ExpertSkip(shape, *POLICY)]}
    with pytest.raises(CheckpointError, match=r"terms.up\[1\]: a skip term stands in down"):
        compressed(module, wrong)
    experts = compressed(module, with_policy(terms, [0.5, 0.5], [0.2, 0.3, 0.5]))
    with pytest.raises(ValueError, match="tokens choose 2 experts, the skip term is for 3"):
        experts(*inputs(experts))


def test_a_list_of_experts_cannot_skip():
    class Expert(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = torch.nn.Linear(6, 8, bias=False)
            self.up_proj = torch.nn.Linear(6, 8, bias=False)
            self.down_proj = torch.nn.Linear(8, 6, bias=False)
            self.act_fn = torch.nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([Expert(), Expert()])

    block = Block()
    terms = {part: [Dense(*stack(block.experts, part))] for part in ("gate", "up", "down")}
    terms = with_policy(terms)
    specs = {part: [term.spec() for term in bank] for part, bank in terms.items()}
    with pytest.raises(
        CheckpointError, match="the block's own code calls experts: none is skipped"
    ):
        swap(block, {"experts": {"type": "expert_list", "terms": specs}})


def stack(experts, part):
    from mctk.terms import BankShape

    weight = torch.stack([getattr(expert, f"{part}_proj").weight.detach() for expert in experts])
    return BankShape(*weight.shape), range(len(weight)), weight
