"""Experts that agree in all terms are one: computed once per token, with their weights added up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compression import exact_terms
from mctk.runtime import dynamic_pruning, merged_groups, observe
from mctk.runtime.rows import Pairs, Rows
from mctk.runtime.shared import Forward
from mctk.terms import BankShape, Bias, Dense, DynamicDense, LowRank, Sparse
from test_runtime_experts import routing
from test_runtime_shared import LAYOUTS, assert_equal, compressed, inputs, original, plain

KINDS = ["groups", "base beside groups", "low rank", "shared V, groups of U", "dropped member"]


def merged_terms(module, kind, dtype=torch.float64):
    """Terms in which experts 1 and 3 agree (of eight: 1, 3 and 6, and 2 and 5); biases too."""
    generator = torch.Generator().manual_seed(7)

    def noise(*size):
        return (0.3 * torch.randn(*size, generator=generator)).to(dtype)

    terms = {}
    for part, (dense, *biases) in exact_terms(module).items():
        shape = dense.shape
        members, out, into = shape.members, shape.out_features, shape.in_features
        slots = [0, 1, 2, 1] if members == 4 else [3, 1, 2, 1, 0, 2, 1, 4]
        if kind == "dropped member":
            slots = [None if e == 2 else slot for e, slot in enumerate(slots)]
        stored = 1 + max(slot for slot in slots if slot is not None)
        one = [0] * members
        groups = Dense(shape, slots, noise(stored, out, into))
        if kind == "groups" or kind == "dropped member":
            found = [groups]
        elif kind == "base beside groups":
            places = torch.stack([torch.randperm(out * into, generator=generator)[:9]] * stored)
            found = [
                Dense(shape, one, noise(1, out, into)),
                groups,
                Sparse(shape, slots, noise(stored, 9), places.int()),
            ]
        elif kind == "low rank":
            U, V = noise(stored, out, 4), noise(stored, 4, into)
            found = [LowRank(shape, slots, slots, U=U, V=V)]
        else:
            U, V = noise(stored, out, 4), noise(1, 4, into)
            found = [LowRank(shape, slots, one, U=U, V=V)]
        vectors = [Bias(shape, slots, noise(stored, out)) for _ in biases]
        terms[part] = [*found, *vectors]
    return terms


def counts(monkeypatch):
    """How many rows go through each activation from now on."""
    seen = []

    def watch(experts):
        activate = experts._activate
        monkeypatch.setattr(
            experts, "_activate", lambda wide: (seen.append(len(wide)), activate(wide))[1]
        )
        return seen

    return watch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_experts_equal_the_plain_loop(layout, kind):
    module = original(layout).double()
    experts = compressed(module, merged_terms(module, kind))
    assert experts._path.merged is not None
    x, index, weights = inputs(experts)
    given = x.double(), index, weights.double()
    got = experts(*given)
    assert_equal(got, plain(experts, *given), 1e-12)
    one = tuple(t[:1] for t in given)
    assert_equal(experts(*one), plain(experts, *one), 1e-12)


def test_against_the_sum_by_hand():
    module = original("mixtral").double()
    experts = compressed(module, merged_terms(module, "groups"))
    x, index, weights = inputs(experts)
    x, weights = x.double(), weights.double()
    banks = {part: experts.bank(part) for part in ("gate", "up", "down")}
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for e, g in zip(index[token].tolist(), weights[token], strict=True):
            row = x[token : token + 1]
            h = F.silu(banks["gate"].apply(row, e)) * banks["up"].apply(row, e)
            expected[token] += g * banks["down"].apply(h, e)[0]
    assert_equal(experts(x, index, weights), expected, 1e-12)


def test_a_token_with_two_members_of_a_group_is_one_row(monkeypatch):
    module = original("mixtral").double()
    experts = compressed(module, merged_terms(module, "groups"))
    index = torch.tensor([[1, 3], [3, 1], [0, 3], [2, 1]])
    weights = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.5, 0.5], [0.6, 0.4]]).double()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).double()
    seen = counts(monkeypatch)(experts)
    got = experts(x, index, weights)
    assert sum(seen) == 6  # tokens 0 and 1 are one row each
    alone = experts(x[:1], torch.tensor([[1, 0]]), torch.tensor([[1.0, 0.0]]).double())
    assert_equal(got[:1], alone, 1e-12)


def test_members_of_a_group_take_the_rows_of_their_first():
    choices = torch.tensor([[3, 1], [0, 3], [1, 2], [2, 0]])
    rows = Rows(choices, 4, (0, 1, 2, 1))
    assert [(s.expert, s.start, s.stop) for s in rows.segments] == [(0, 0, 2), (1, 2, 5), (2, 5, 7)]
    assert rows.token.tolist() == [1, 3, 0, 1, 2, 2, 3]
    assert rows.inverse().tolist() == [[2, 7], [0, 3], [4, 5], [6, 1]]
    weights = torch.tensor([[0.25, 0.5], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert rows.weights(weights).tolist() == [[0.75, 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    pairs = Pairs((0, 0, None, 0), rows)
    values = torch.arange(1.0, 8.0)[:, None]
    summed = pairs.sum_rows(values, rows.weights(weights))[:, 0]
    assert summed.tolist() == [3 * 0.75, 1 * 1.0 + 4 * 2.0, 5 * 3.0, 2 * 6.0]


def test_an_expert_number_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="expert index 4 of 4"):
        Rows(torch.tensor([[0, 4]]), 4, (0, 0, 2, 3))


def test_groups_agree_in_every_term():
    shape = BankShape(4, 3, 5)

    def dense(*slots):
        return Dense(shape, slots, torch.zeros(4, 3, 5))

    assert merged_groups({"up": [dense(0, 0, 1, 1)], "down": [dense(0, 1, 2, 2)]}) == (0, 1, 2, 2)
    assert merged_groups({"up": [dense(0, 0, 1, 1)], "down": [dense(0, 1, 2, 3)]}) is None
    assert merged_groups({"up": [dense(0, None, 1, None)], "down": []}) is None  # dropped
    assert merged_groups({"up": [dense(0, None, 1, None)], "down": [dense(0, 1, 2, 1)]}) == (
        0, 1, 2, 1
    )  # fmt: skip
    low = LowRank(shape, (0, 0, 1, 1), (0, 1, 2, 2), U=torch.zeros(2, 3, 2), V=torch.zeros(3, 2, 5))
    assert merged_groups({"up": [low]}) == (0, 1, 2, 2)
    assert merged_groups({"up": [], "down": []}) is None


@pytest.mark.parametrize("layout", ["mixtral", "gpt_oss", "norm"])
def test_observers_see_every_member(layout):
    module = original(layout).double()
    experts = compressed(module, merged_terms(module, "base beside groups"))
    x, index, weights = inputs(experts)
    x, weights = x.double(), weights.double()
    seen = torch.zeros_like(index, dtype=torch.bool)
    total = torch.zeros_like(x)

    def observer(expert, token, slot, rows, h, y, routed):
        assert torch.equal(index[token, slot], torch.full_like(token, expert))
        assert torch.equal(x[token], rows) and torch.equal(weights[token, slot], routed)
        seen[token, slot] = True
        total.index_add_(0, token, y * routed[:, None])

    with observe(experts, observer):
        experts(x, index, weights)
    assert bool(seen.all())
    assert_equal(experts(x, index, weights), total, 1e-12)


@pytest.mark.parametrize("slots", ["one base", "a base for each group"])
def test_dynamic_bases_beside_merged_experts(slots):
    """Which channels are skipped, and what comes out, is the same with and without observers."""
    module = original("mixtral").double()
    terms = merged_terms(module, "groups")
    for part, bank in terms.items():
        shape = bank[0].shape
        own = [0] * 4 if slots == "one base" else [0, 1, 0, 1]
        axis = "cols" if part == "down" else "rows"
        stored = max(own) + 1
        generator = torch.Generator().manual_seed(len(part))
        weight = torch.randn(stored, *shape_of(shape), generator=generator).double()
        energy = torch.ones(stored, 24).double() if part == "down" else None
        bank.insert(0, DynamicDense(shape, own, weight, drop=9, axis=axis, energy=energy))
    experts = compressed(module, terms)
    assert experts._path.merged == (0, 1, 2, 1) and experts._path.dynamic == 0
    x, index, weights = inputs(experts, 40)
    given = x.double(), index, weights.double()
    got = experts(*given)
    kept = experts.active_channels
    assert kept is not None
    watched = plain(experts, *given)
    again = experts.active_channels
    assert again is not None and all(torch.equal(kept[slot], again[slot]) for slot in kept)
    assert_equal(got, watched, 1e-12)
    with dynamic_pruning(experts, False):
        assert_equal(experts(*given), plain(experts, *given), 1e-12)


def shape_of(shape):
    return shape.out_features, shape.in_features


def test_float16_sums_keep_their_type():
    module = original("gpt_oss").bfloat16()
    experts = compressed(module, merged_terms(module, "groups", torch.bfloat16))
    x, index, weights = inputs(experts)
    for routed in (torch.bfloat16, torch.float32):
        given = x.bfloat16(), index, weights.to(routed)
        got = experts(*given)
        assert got.dtype == torch.bfloat16
        assert_equal(got, plain(experts, *given), 0.02)


def test_gradients_reach_inputs_weights_and_routing():
    module = original("qwen2_moe").double()
    experts = compressed(module, merged_terms(module, "base beside groups"))
    for parameter in experts.parameters():
        parameter.requires_grad_(True)
    x, index, weights = inputs(experts)
    found = []
    for run in (experts, lambda *given: plain(experts, *given)):
        leaves = [x.double().requires_grad_(), weights.double().requires_grad_()]
        out = run(leaves[0], index, leaves[1])
        every = [*leaves, *experts.parameters()]
        found.append(torch.autograd.grad(out.square().sum(), every, allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and float(theirs.norm()) > 0:
            assert_equal(ours, theirs, 1e-10)


def test_no_tokens_and_one_expert_for_all():
    module = original("mixtral").double()
    terms = {
        part: [Dense(bank[0].shape, [0] * 4, bank[0].weight[:1])]
        for part, bank in exact_terms(module).items()
    }
    experts = compressed(module, terms)
    x, index, weights = inputs(experts)
    given = x.double(), index, weights.double()
    assert_equal(experts(*given), plain(experts, *given), 1e-12)
    nobody, none = routing(0)
    assert experts(torch.zeros(0, 32).double(), nobody, none.double()).shape == (0, 32)


@pytest.mark.parametrize("kind", ["groups", "base beside groups", "original"])
def test_choices_that_are_not_kept_add_nothing(kind):
    """As if their routing weights were zero, and they are not computed."""
    module = original("mixtral").double()
    terms = exact_terms(module) if kind == "original" else merged_terms(module, kind)
    experts = compressed(module, terms)
    x, index, weights = inputs(experts)
    x, weights = x.double(), weights.double()
    kept = torch.rand(index.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    kept[3], kept[4] = False, True
    banks = {part: experts.bank(part) for part in ("gate", "up", "down")}
    expected = experts(x, index, weights * kept)
    forward = Forward(
        experts._path, banks, x, index, weights, 4,
        activate=experts._activate, norm=None, norms=experts._norms, skipping=False, kept=kept,
    )  # fmt: skip
    assert_equal(forward.run(), expected, 1e-12)
    assert forward.rows.places.numel() <= int(kept.sum())
    if kind == "original":
        assert torch.equal(forward.rows.places, Rows(index, 4, kept=kept).places)
        assert forward.rows.counts == torch.bincount(index[kept], minlength=4).tolist()
