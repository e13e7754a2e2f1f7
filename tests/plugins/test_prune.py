"""Expert pruning: scores by hand, the choice, and what is left of a layer."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mctk.errors import UserError
from mctk.notes import collect
from mctk.registry import load_plugins
from mctk.statistics import (
    ExpertFrequency,
    ExpertOutputs,
    LayerStatistics,
    OutputSums,
    RouterWeight,
)
from mctk.statistics.outputs import OutputTotals
from mctk.terms import DENSE, Bank, BankShape, Bias, Dense
from mctk_prune.math import best, output_norms, random_scores, variations, weighted_norms

H, WIDTH, E = 4, 3, 6
REMOVERS = ["random", "frequency", "router_weight", "ean", "reap"]


REGISTRY = load_plugins()


def method(name):
    return REGISTRY.method("prune", name)


def options(name, **values):
    return method(name).Options(**values)


def layer(experts=E, groups=1, biases=False, index=0, seed=0):
    """Gate, up and down of some experts."""
    generator = torch.Generator().manual_seed(seed)
    banks = {}
    for part, (rows, columns) in {"gate": (WIDTH, H), "up": (WIDTH, H), "down": (H, WIDTH)}.items():
        shape = BankShape(experts, rows, columns)
        weight = torch.randn(experts, rows, columns, generator=generator)
        terms = [Dense(shape, range(experts), weight)]
        if biases:
            vector = torch.randn(experts, rows, generator=generator)
            terms.append(Bias(shape, range(experts), vector))
        banks[f"experts.{part}"] = Bank(f"experts.{part}", index, shape, terms, groups)
    return banks


def sums(rows: list[list[tuple[float, list[float]]]]) -> OutputSums:
    """From (routing weight, output) of every token of every expert."""
    totals = OutputTotals(len(rows), len(rows[0][0][1]), torch.device("cpu"))
    for expert, pairs in enumerate(rows):
        if pairs:
            y = torch.tensor([y for _, y in pairs])
            weights = torch.tensor([g for g, _ in pairs])
            totals.add(expert, y, torch.arange(len(pairs)), weights)
    return totals.value()


def random_sums(experts=E, tokens=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sums(
        [
            [
                (float(torch.rand((), generator=generator)), row.tolist())
                for row in torch.randn(tokens + e, H, generator=generator)
            ]
            for e in range(experts)
        ]
    )


def statistics(found=None, frequency=None, weight=None, experts=E):
    values = {
        ExpertOutputs(): random_sums(experts) if found is None else found,
        ExpertFrequency(): torch.arange(experts) + 3 if frequency is None else frequency,
        RouterWeight(): torch.arange(experts) + 0.5 if weight is None else weight,
    }
    return LayerStatistics(0, values, layer())


# Scores.


def test_reap_by_hand():
    # Three tokens; the first two reach expert 0, the last two expert 1, none expert 2.
    found = sums(
        [
            [(0.5, [3.0, 4.0]), (0.25, [0.0, 2.0])],  # 0.5·5 and 0.25·2
            [(0.75, [1.0, 0.0]), (1.0, [0.0, 2.0])],  # 0.75·1 and 1·2
            [],
        ]
    )
    assert weighted_norms(found).tolist() == [(2.5 + 0.5) / 2, (0.75 + 2) / 2, 0]
    assert output_norms(found, "sum").tolist() == [7, 3, 0]
    assert output_norms(found, "mean").tolist() == [3.5, 1.5, 0]
    assert output_norms(found, "max").tolist() == [5, 2, 0]
    assert output_norms(found, "weighted_sum").tolist() == [3, 2.75, 0]


def test_the_scores_differ_in_whom_they_drop():
    # REAP keeps an expert that is rarely chosen and then adds much; frequency and EAN do not.
    found = sums([[(1.0, [9.0])], [(0.1, [3.0])] * 9, [(0.5, [4.0])] * 4])
    given = statistics(found, found.count, torch.tensor([1.0, 0.9, 2.0]), experts=3)
    dropped = {}
    for name in ("frequency", "router_weight", "ean", "reap"):
        scores = method(name).scores(0, 3, given, options(name))
        dropped[name] = int(scores.argmin())
    assert dropped == {"frequency": 0, "router_weight": 1, "ean": 0, "reap": 1}
    for score, expected in (("mean", 1), ("max", 1), ("weighted_sum", 1), ("sum", 0)):
        scores = method("ean").scores(0, 3, given, options("ean", score=score))
        assert int(scores.argmin()) == expected


def test_variation_by_hand():
    found = sums([[(1.0, [1.0, 5.0]), (1.0, [3.0, 5.0])], [(1.0, [7.0, 7.0])], []])
    assert variations(found).tolist() == [math.sqrt(2.0), 0, 0]  # variance with n - 1


def test_mones_scores():
    found = random_sums()
    given = statistics(found)
    weight = given[RouterWeight()]
    parts = {
        name: method("mone").scores(0, E, given, options("mone", score=name))
        for name in ("both", "variation", "weight")
    }
    assert torch.equal(parts["variation"], variations(found))
    assert torch.equal(parts["weight"], weight)
    assert torch.equal(parts["both"], variations(found) * weight)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(E)))
def test_scores_follow_the_experts(order):
    found = random_sums()
    moved = OutputSums(**{k: v[list(order)] for k, v in vars(found).items()})
    before = statistics(found)
    after = statistics(moved, *(before[n()][list(order)] for n in (ExpertFrequency, RouterWeight)))
    for name in ("frequency", "router_weight", "ean", "reap", "mone"):
        scores = method(name).scores(0, E, before, options(name))
        assert torch.equal(method(name).scores(0, E, after, options(name)), scores[list(order)])


def test_random_is_seeded():
    assert torch.equal(random_scores(9, 2, 5), random_scores(9, 2, 5))
    others = [random_scores(9, 3, 5), random_scores(9, 2, 6), random_scores(9, 2, 0)]
    assert not any(torch.equal(random_scores(9, 2, 5), other) for other in others)
    chosen = [method("random").prune(layer(index=i), None, 3, options("random")) for i in (0, 1)]
    kept = [[e for e in range(E) if terms["experts.up"][0].has(e)] for terms in chosen]
    assert kept[0] != kept[1]


# The choice.


def test_the_best_stay_and_of_equals_the_first():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, 2.0])
    assert best(scores, 2, 1, range(6)) == [1, 3]
    assert best(scores, 3, 1, range(6)) == [1, 2, 3]
    assert best(scores, 2, 1, [0, 4, 5]) == [0, 5]
    # Two groups of three: one of each.
    assert best(scores, 2, 2, range(6)) == [1, 3]
    assert best(torch.tensor([5.0, 6.0, 7.0, 1.0, 2.0, 3.0]), 4, 2, range(6)) == [1, 2, 4, 5]


@pytest.mark.parametrize("name", [*REMOVERS, "mone"])
@pytest.mark.parametrize("biases", [False, True])
def test_the_banks_store_what_sizes_say(name, biases):
    banks = layer(biases=biases)
    chosen = options(name)
    sizes, costs = method(name).sizes(banks, chosen)
    assert sizes == [1, 2, 3, 4, 5, DENSE]
    assert costs[-1] == sum(bank.parameters() for bank in banks.values())
    meta = {n: replace(b, terms=[t.to(device="meta") for t in b.terms]) for n, b in banks.items()}
    for size, cost in zip(sizes, costs, strict=True):
        planned = method(name).layout(meta, size, chosen)
        made = method(name).prune(banks, statistics(), size, chosen)
        if size == DENSE:
            assert planned == made == {}
            continue
        for terms in (planned, made):
            assert set(terms) == set(banks)
            assert sum(t.parameters() for bank in terms.values() for t in bank) == cost
        for bank in banks:
            assert [t.spec()["tensors"] for t in planned[bank]] == [
                t.spec()["tensors"] for t in made[bank]
            ]


@pytest.mark.parametrize("name", REMOVERS)
def test_kept_experts_are_untouched_and_the_others_gone(name):
    banks = layer(biases=True)
    scores = method(name).scores(0, E, statistics(), options(name))
    kept = scores.argsort(descending=True)[:4].tolist()
    found = method(name).prune(banks, statistics(), 4, options(name))
    for bank, terms in found.items():
        pruned = replace(banks[bank], terms=terms)
        for e in range(E):
            weight, bias = pruned.materialise(e)
            if e not in kept:
                assert weight is None and bias is None
                continue
            for now, before in zip((weight, bias), banks[bank].materialise(e), strict=True):
                assert torch.equal(now, before)


@pytest.mark.parametrize("name", [*REMOVERS, "mone"])
def test_nothing_pruned_changes_nothing(name):
    for size in (E, DENSE, None):
        assert method(name).prune(layer(), statistics(), size, options(name)) == {}
        assert method(name).layout(layer(), size, options(name)) == {}


@pytest.mark.parametrize("name", [*REMOVERS, "mone"])
def test_the_curve_falls_to_zero(name):
    errors = method(name).curve(layer(), statistics(), options(name))
    assert len(errors) == len(method(name).sizes(layer(), options(name))[0])
    assert errors[-1] == 0 and errors == sorted(errors, reverse=True) and errors[0] > 0
    scores = method(name).scores(0, E, statistics(), options(name)).sort().values
    assert math.isclose(errors[-3], float(scores[:2].sum()), rel_tol=1e-12)


def test_a_router_with_groups_keeps_as_many_of_each():
    banks = layer(experts=8, groups=2)
    assert method("frequency").sizes(banks, options("frequency"))[0] == [4, 6, DENSE]
    given = statistics(frequency=torch.tensor([9, 8, 7, 6, 5, 4, 3, 2]), experts=8)
    for keep, expected in ((4, [0, 1, 4, 5]), (6, [0, 1, 2, 4, 5, 6])):
        found = method("frequency").prune(banks, given, keep, options("frequency"))
        assert [e for e in range(8) if found["experts.up"][0].has(e)] == expected
        planned = method("frequency").layout(banks, keep, options("frequency"))
        there = [e for e in range(8) if planned["experts.up"][0].has(e)]
        assert len(there) == keep and sum(e < 4 for e in there) == keep // 2
    # MoNE leaves the router as it is: any number goes.
    assert method("mone").sizes(banks, options("mone"))[0] == [1, 2, 3, 4, 5, 6, 7, DENSE]
    with pytest.raises(UserError, match=r"5 of the experts of layer 0 cannot stay; 4 to 6 in ste"):
        method("frequency").layout(banks, 5, options("frequency"))


@pytest.mark.parametrize("size", [0, 7])
def test_a_number_that_is_impossible_is_refused(size):
    with pytest.raises(UserError, match=rf"prune/reap: {size} of .* cannot stay; 1 to 5 can"):
        method("reap").layout(layer(), size, options("reap"))


def test_protected_experts_stay():
    chosen = options("frequency", protect={0: [0], 3: [1, 2]})
    given = statistics(frequency=torch.arange(E))
    found = method("frequency").prune(layer(), given, 2, chosen)
    assert [e for e in range(E) if found["experts.up"][0].has(e)] == [0, 5]
    found = method("frequency").prune(layer(index=3), given, 2, chosen)
    assert [e for e in range(E) if found["experts.up"][0].has(e)] == [1, 2]
    # As many in every layer: two at least.
    assert method("frequency").sizes(layer(), chosen)[0] == [2, 3, 4, 5, DENSE]
    grouped = options("frequency", protect={1: [0, 1, 2]})
    assert method("frequency").sizes(layer(experts=8, groups=2), grouped)[0] == [6, DENSE]
    with pytest.raises(UserError, match=r"options.protect: layer 0 has experts 0 to 5, there is n"):
        method("reap").layout(layer(), 3, options("reap", protect={0: [6]}))
    with pytest.raises(ValueError, match="counted from 0"):
        options("reap", protect={0: [-1]})


def test_experts_that_are_gone_already_are_no_candidates():
    banks = layer()
    first = method("frequency").prune(banks, statistics(), 4, options("frequency"))
    banks = {name: replace(bank, terms=first[name]) for name, bank in banks.items()}
    assert method("frequency").sizes(banks, options("frequency"))[0] == [1, 2, 3, DENSE]
    given = statistics(frequency=torch.tensor([9, 9, 5, 1, 2, 3]))
    again = method("frequency").prune(banks, given, 2, options("frequency"))
    assert [e for e in range(E) if again["experts.up"][0].has(e)] == [2, 5]
    assert method("frequency").prune(banks, given, 4, options("frequency")) == {}


def test_a_shared_base_stays():
    banks = layer()
    for name, bank in banks.items():
        base = bank.terms[0].weight.mean(0, keepdim=True)
        banks[name] = replace(bank, terms=[Dense(bank.shape, [0] * E, base), *bank.terms])
    _, costs = method("frequency").sizes(banks, options("frequency"))
    found = method("frequency").prune(banks, statistics(), 2, options("frequency"))
    assert sum(t.parameters() for terms in found.values() for t in terms) == costs[1]
    assert all(terms[0].weight.shape[0] == 1 for terms in found.values())


def test_experts_merged_into_groups_are_refused():
    banks = layer()
    bank = banks["experts.up"]
    merged = Dense(bank.shape, [0, 0, 1, 2, 3, 4], bank.terms[0].weight[:5])
    banks["experts.up"] = replace(bank, terms=[merged])
    with pytest.raises(UserError, match=r"experts.up in layer 0 do not store the same amount each"):
        method("reap").sizes(banks, options("reap"))


# MoNE.


def gives(banks, expert, x):
    gate, up = (banks[f"experts.{part}"].apply(x, expert) for part in ("gate", "up"))
    return banks["experts.down"].apply(torch.nn.functional.silu(gate) * up, expert)


@pytest.mark.parametrize("biases", [False, True])
def test_a_replaced_expert_gives_its_mean_output(biases):
    banks = layer(biases=biases)
    x = torch.randn(11, H, generator=torch.Generator().manual_seed(7))
    totals = OutputTotals(E, H, torch.device("cpu"))
    for e in range(E):
        totals.add(e, gives(banks, e, x), torch.arange(11), torch.full((11,), 0.5))
    found = method("mone").prune(banks, statistics(totals.value()), 2, options("mone"))
    pruned = {name: replace(bank, terms=found[name]) for name, bank in banks.items()}
    kept = [e for e in range(E) if found["experts.up"][0].has(e)]
    assert len(kept) == 2
    for e in range(E):
        own, now = gives(banks, e, x), gives(pruned, e, x)
        expected = own if e in kept else own.mean(0).expand(11, H)
        torch.testing.assert_close(now, expected)
        assert any(term.has(e) for term in found["experts.down"])  # nobody is removed


def test_experts_that_are_constant_lose_nothing():
    # Zero down matrices with a bias: whatever comes in, the same goes out.
    banks = layer(biases=True)
    dense, bias = banks["experts.down"].terms
    zero = Dense(dense.shape, dense.slots, torch.zeros_like(dense.weight))
    banks["experts.down"] = replace(banks["experts.down"], terms=[zero, bias])
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(1))
    totals = OutputTotals(E, H, torch.device("cpu"))
    for e in range(E):
        totals.add(e, gives(banks, e, x), torch.arange(5), torch.rand(5))
    given = statistics(totals.value())
    assert float(method("mone").scores(0, E, given, options("mone")).max()) < 1e-6
    found = method("mone").prune(banks, given, 1, options("mone"))
    pruned = {name: replace(bank, terms=found[name]) for name, bank in banks.items()}
    for e in range(E):
        torch.testing.assert_close(gives(pruned, e, x), gives(banks, e, x))


def test_an_expert_that_was_never_chosen_becomes_zero():
    found = sums([[(1.0, [1.0] * H), (1.0, [2.0] * H)], *[[] for _ in range(E - 1)]])
    with collect() as notes:
        terms = method("mone").prune(layer(), statistics(found), 1, options("mone"))
    assert notes == ["5 experts became constants: 1, 2, 3, 4, 5"]
    assert terms["experts.up"][0].has(0)
    assert not terms["experts.down"][-1].vector.any()


@pytest.mark.parametrize(
    ("counts", "size", "words"),
    [
        ([5, 0, 3, 0, 0, 7], 4, "experts 3, 4, which go, and 1, which stay .*(without a token"),
        (
            [5, 2, 3, 2, 9, 7],
            5,
            r"experts 3, which go, and 1, which stay by their numbers: .*equal$",
        ),
        ([5, 0, 3, 0, 0, 7], 3, None),  # all of the equal ones go
        ([5, 1, 3, 2, 9, 7], 4, None),
    ],
)
def test_a_score_that_decided_nothing_is_told(counts, size, words):
    with collect() as notes:
        prune = method("frequency").prune
        prune(layer(), statistics(frequency=torch.tensor(counts)), size, options("frequency"))
    assert len(notes) == (words is not None)
    if words:
        assert re.search(words.replace("(without", r"\(without"), notes[0])


def test_protected_experts_are_no_ties():
    counts = torch.tensor([0, 0, 3, 4, 5, 6])
    safe = options("frequency", protect={0: [1]})
    with collect() as notes:
        method("frequency").prune(layer(), statistics(frequency=counts), 5, safe)
    assert not notes
