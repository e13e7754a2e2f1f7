"""What plugins share that keep fewer experts: sizes, layouts, averages, orders, similarities."""

from __future__ import annotations

import itertools

import pytest
import torch
from mctk.decompose import averaged, expert_layout, expert_sizes, whole_experts
from mctk.errors import UserError
from mctk.linalg import assign, cosines, reorder
from mctk.terms import DENSE, Bank, BankShape, Bias, Dense, drop_members, pack


def layer(members: int = 6, groups: int = 1) -> dict[str, Bank]:
    """Gate, up and down of experts with I = 5 and H = 4, and a bias each."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, (out, into) in {"gate": (5, 4), "up": (5, 4), "down": (4, 5)}.items():
        shape = BankShape(members, out, into)
        weight = torch.randn(members, out, into, generator=generator)
        bias = torch.randn(members, out, generator=generator)
        terms = [Dense(shape, range(members), weight), Bias(shape, range(members), bias)]
        found[f"experts.{part}"] = Bank(f"experts.{part}", 2, shape, terms, groups)
    return found


@pytest.mark.parametrize(("groups", "counts"), [(1, [1, 2, 3, 4, 5]), (2, [4]), (3, [])])
def test_sizes_say_what_layouts_store(groups, counts):
    banks = layer(groups=groups)
    settings, costs = expert_sizes(banks)
    assert settings == [*counts, DENSE]
    for size, cost in zip(settings, costs, strict=True):
        terms = expert_layout(banks, size)
        assert sum(term.parameters() for held in terms.values() for term in held) == cost
        kept = [e for e in range(6) if terms["experts.up"][0].has(e)]
        width = 6 // groups
        each = {sum(e // width == group for e in kept) for group in range(groups)}
        assert each == {(6 if size == DENSE else size) // groups}


def test_experts_that_are_gone_are_not_counted():
    banks = {n: Bank(n, 2, b.shape, drop_members(b, [0, 4])) for n, b in layer().items()}
    assert expert_sizes(banks)[0] == [1, 2, 3, DENSE]
    assert [e for e in range(6) if expert_layout(banks, 2)["experts.up"][0].has(e)] == [1, 2]


@pytest.mark.parametrize("size", [0, 7, None])
def test_a_number_that_cannot_stay_is_refused(size):
    with pytest.raises(UserError, match=f"layer 2 has 6 experts and cannot keep {size}"):
        expert_layout(layer(), size)


def test_router_groups_keep_equally_many():
    with pytest.raises(UserError, match="into 2 groups, and as many of each must stay: 3 is no"):
        expert_layout(layer(groups=2), 3)


@pytest.mark.parametrize("shared", [True, False])
def test_an_average_of_experts(shared):
    """Of an expert and itself in another order it is that expert, whatever the weights."""
    banks = layer()
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(5, generator=generator) for _ in range(6)])
    groups, scale = [[3, 1], [0]], torch.tensor([0.0, 2.0, 1.0, 6.0, 1.0, 1.0])
    for name, bank in banks.items():
        weight, bias = (t.weight if isinstance(t, Dense) else t.vector for t in bank.terms)
        found = averaged(bank, groups, scale, order, shared=shared)
        assert [type(term) for term in found] == [Dense, Bias]
        assert found[0].slots == found[1].slots == (1, 0 if shared else None, None, 0, None, None)
        part = name.rpartition(".")[2]
        moved = reorder(weight, part, order)
        expected = 0.75 * moved[3] + 0.25 * moved[1]
        assert torch.allclose(found[0].weight[0], expected, atol=1e-6)
        assert torch.equal(found[0].weight[1], moved[0])  # alone, without weight: as it is
        own = bias if part == "down" else bias.gather(1, order)
        assert torch.allclose(found[1].vector[0], 0.75 * own[3] + 0.25 * own[1], atol=1e-6)


def test_what_was_rewritten_is_no_whole_expert():
    bank = layer()["experts.up"]
    assert whole_experts(bank) is bank.terms[0]
    packed = pack(bank.terms[0], 4, 4, False, ["weight"])
    for terms in ([packed, bank.terms[1]], drop_members(bank, [1]), [bank.terms[0]] * 2):
        with pytest.raises(UserError, match=r"experts\.up of layer 2 was rewritten by a step"):
            whole_experts(Bank(bank.name, 2, bank.shape, terms))


def test_an_assignment_is_the_cheapest():
    cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    order = assign(cost)
    least = min(
        float(sum(cost[i, j] for i, j in enumerate(tried)))
        for tried in itertools.permutations(range(5))
    )
    assert float(cost[torch.arange(5), order].sum()) == pytest.approx(least)


def test_cosines_of_each_token():
    outputs = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    outputs[1, 2] = 0.0
    found = cosines(outputs @ outputs.transpose(1, 2))
    expected = torch.nn.functional.cosine_similarity(outputs[:, :, None], outputs[:, None], dim=-1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not found[1, 2].any()
