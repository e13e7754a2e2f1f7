"""What experts share, computed once per token, equals what each expert gives by itself."""

from __future__ import annotations

import copy

import families
import pytest
import torch
import torch.nn.functional as F
from compression import by_hand, exact_terms, split
from mctk.runtime import TermExperts, observe, products, shared
from mctk.runtime.rows import Pairs, Rows, shared_groups
from mctk.terms import BankShape, Bias, Dense, LowRank, Sparse, Term
from test_runtime_experts import bare_experts, routing
from torch import nn

TOKENS = 13


def original(kind: str) -> nn.Module:
    """An original experts module; the last MoE layer of a family, or a rare layout."""
    if kind in ("no gate", "norm"):
        return bare_experts(kind)
    model = families.tiny(kind)
    return [m for m in model.modules() if hasattr(m, "is_transposed")][-1]


def random_terms(module: nn.Module, mixture: str, dtype=torch.float32) -> dict[str, list[Term]]:
    """Terms of a mixture of sharing and not; biases of the original stay."""
    generator = torch.Generator().manual_seed(len(mixture))

    def noise(*size: int) -> torch.Tensor:
        return (0.3 * torch.randn(*size, generator=generator)).to(dtype)

    def some(bound: int, *stored: int) -> torch.Tensor:
        count = max(stored, default=1)
        picked = [torch.randperm(bound, generator=generator)[: bound // 2] for _ in range(count)]
        return (torch.stack(picked) if stored else picked[0]).int()

    terms: dict[str, list[Term]] = {}
    for part, (dense, *biases) in exact_terms(module).items():
        shape = dense.shape
        members, out, into = shape.members, shape.out_features, shape.in_features
        every = list(range(members))
        one = [0] * members
        two = [e % 2 for e in every]
        rank = 4
        delta = LowRank(
            shape, every, every, U=noise(members, out, rank), V=noise(members, rank, into)
        )
        full = Dense(shape, one, noise(1, out, into))
        found: list[Term]
        if mixture == "base and deltas":
            found = [full, delta]
        elif mixture == "pruned base and pivoted deltas":
            wide = part != "down"
            cut = Dense(
                shape,
                one,
                noise(1, out // 2 if wide else out, into if wide else into // 2),
                rows=some(out) if wide else None,
                cols=None if wide else some(into),
            )
            found = [cut, delta.pivot()]
        elif mixture == "shared factors":
            V = LowRank(shape, every, one, U=noise(members, out, rank), V=noise(1, rank, into))
            U = LowRank(shape, one, every, U=noise(1, out, rank), V=noise(members, rank, into))
            both = LowRank(shape, two, two, U=noise(2, out, rank), V=noise(2, rank, into))
            found = [V, U.pivot(), both, V.pivot()]
        elif mixture == "two bases":
            slots = [None, *two[1:]]
            cut = Dense(shape, slots, noise(2, out // 2, into), rows=some(out, 2))
            absent = [None if e == members - 1 else e for e in every]
            partial = LowRank(shape, absent, absent, U=delta.U, V=delta.V)
            found = [cut, partial]
        elif mixture == "merged":
            # Only up's and down's slots are the same.
            slots = every if part == "gate" else two
            found = [Dense(shape, slots, noise(max(slots) + 1, out, into))]
        else:
            assert mixture == "all kinds"
            places = [torch.randperm(out * into, generator=generator)[:9] for _ in every]
            positions = torch.stack(places)
            own = [e if e < 2 else None for e in every]
            found = [
                full,
                Sparse(shape, every, noise(members, 9), positions.int()),
                Sparse(shape, one, noise(1, 9), positions[:1].int()),
                Dense(shape, own, noise(2, out, into)),
                Bias(shape, two, noise(2, out)),
                delta,
            ]
        terms[part] = [*found, *(bias.to(dtype) for bias in biases)]
    return terms


def compressed(module: nn.Module, terms: dict[str, list[Term]]) -> TermExperts:
    experts = TermExperts(module, {p: [t.spec() for t in bank] for p, bank in terms.items()})
    for part, bank in terms.items():
        experts.set_terms(part, bank)
    return experts


def plain(module: TermExperts, *inputs: torch.Tensor) -> torch.Tensor:
    with observe(module, lambda *_: None):
        return module(*inputs)


def inputs(module: TermExperts, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    hidden = module.shapes["up"].in_features
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))
    k = 3 if module.num_experts > 4 else 2
    return x, *routing(tokens, module.num_experts, k)


def assert_equal(got: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert got.dtype == expected.dtype
    got, expected = got.detach().double(), expected.detach().double()
    error = (got - expected).norm() / expected.norm()
    assert float(error) < relative


MIXTURES = [
    "base and deltas",
    "pruned base and pivoted deltas",
    "shared factors",
    "two bases",
    "merged",
    "all kinds",
]
LAYOUTS = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "no gate", "norm"]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_equals_the_plain_loop(layout, mixture):
    module = original(layout)
    terms = random_terms(module, mixture)
    experts = compressed(module, terms)
    assert experts._path.shares
    given = inputs(experts)
    got = experts(*given)
    assert_equal(got, plain(experts, *given))
    one = tuple(t[:1] for t in given)
    assert_equal(experts(*one), plain(experts, *one))
    if layout in families.FAMILIES:
        assert_equal(got, by_hand(experts, module, *given))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_results_do_not_depend_on_chance(mixture):
    module = original("gpt_oss")
    experts = compressed(module, random_terms(module, mixture))
    given = inputs(experts)
    assert torch.equal(experts(*given), copy.deepcopy(experts)(*given))


def test_float64_is_equal_to_rounding():
    module = original("mixtral").double()
    experts = compressed(module, random_terms(module, "base and deltas", torch.float64))
    x, index, weights = inputs(experts)
    given = x.double(), index, weights.double()
    assert_equal(experts(*given), plain(experts, *given), 1e-12)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("routed", [torch.bfloat16, torch.float32])
def test_bfloat16(mixture, routed):
    module = original("gpt_oss").bfloat16()
    experts = compressed(module, random_terms(module, mixture, torch.bfloat16))
    x, index, weights = inputs(experts)
    given = x.bfloat16(), index, weights.to(routed)
    got = experts(*given)
    assert got.dtype == torch.bfloat16
    assert_equal(got, plain(experts, *given), 0.02)


@pytest.fixture
def products_of(monkeypatch):
    """Counts the rows that are multiplied with matrices of a shape."""

    def count(shape: tuple[int, int]) -> list[int]:
        seen: list[int] = []
        linear = F.linear

        def counting(x, weight, *bias):
            if tuple(weight.shape) == shape:
                seen.append(len(x))
            return linear(x, weight, *bias)

        monkeypatch.setattr(F, "linear", counting)
        return seen

    return count


@pytest.mark.parametrize("shape", [(24, 32), (32, 24)])  # gate and up; down
def test_a_base_is_multiplied_once_per_token(products_of, shape):
    module = original("mixtral")
    experts = compressed(module, random_terms(module, "base and deltas"))
    seen = products_of(shape)
    experts(*inputs(experts))
    assert seen == [TOKENS] * (1 + (shape == (24, 32)))
    each = sum(seen)
    seen.clear()
    plain(experts, *inputs(experts))
    assert sum(seen) == 2 * each  # k = 2


@pytest.mark.parametrize("shape", [(12, 32), (16, 24)])
def test_two_bases_serve_their_own_tokens(products_of, shape):
    module = original("mixtral")
    experts = compressed(module, random_terms(module, "two bases"))
    x, index, weights = inputs(experts)
    seen = products_of(shape)
    experts(x, index, weights)
    # Member 0 has no base; members 1 and 3 share one, 2 has the other.
    odd = int(((index == 1) | (index == 3)).any(1).sum())
    even = int((index == 2).any(1).sum())
    assert 0 < even < odd < 2 * TOKENS - even
    assert seen == [odd, even] * (1 + (shape == (12, 32)))


def test_rows_are_cut_into_blocks():
    choices = torch.tensor([[0, 3]] * 7 + [[2, 3]] * 2)
    rows = Rows(choices, 5)  # 7 rows of expert 0, 2 of expert 2, 9 of expert 3
    found = rows.blocks(4, 5)
    assert [start for start, _ in found] == [0, 7, 13]
    # The 7 are cut into 3 and 4, and 3 are too few; the 9 into 4 and 5, and 2 are too few.
    cut = [[(s.expert, s.start, s.stop) for s in block.segments] for _, block in found]
    assert cut == [[(0, 0, 7)], [(2, 0, 2), (3, 2, 6)], [(3, 0, 5)]]
    assert torch.equal(torch.cat([block.places for _, block in found]), rows.places)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_blocks_change_nothing(monkeypatch, mixture):
    module = original("gpt_oss")
    experts = compressed(module, random_terms(module, mixture))
    given = inputs(experts)
    whole = experts(*given)
    monkeypatch.setattr(shared, "_BLOCK", (3, 4))
    assert_equal(experts(*given), whole, 1e-6)


def test_modules_that_share_nothing_run_by_the_plain_loop():
    module = original("mixtral")
    experts = compressed(module, exact_terms(module))
    assert not experts._path.shares
    given = inputs(experts)
    assert torch.equal(experts(*given), plain(experts, *given))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_gradients_reach_inputs_and_weights(mixture):
    module = original("qwen2_moe")
    experts = compressed(module, random_terms(module, mixture))
    for parameter in experts.parameters():
        parameter.requires_grad_(True)
    x, index, weights = inputs(experts)
    found = []
    for run in (experts, lambda *given: plain(experts, *given)):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = run(leaves[0], index, leaves[1])
        found.append(
            torch.autograd.grad(
                out.square().sum(), [*leaves, *experts.parameters()], allow_unused=True
            )
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and float(theirs.norm()) > 0:
            assert_equal(ours, theirs, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_equal_the_loop(monkeypatch, dtype):
    module = original("mixtral").to(dtype)
    shape = split(module)["up"][0].shape
    rank = 8
    terms = random_terms(module, "base and deltas", dtype)
    for part, bank in terms.items():
        size = BankShape(shape[0], *((24, 32) if part != "down" else (32, 24)))
        bank[1] = LowRank(
            size,
            range(4),
            range(4),
            U=torch.randn(4, size.out_features, rank).to(dtype),
            V=torch.randn(4, rank, size.in_features).to(dtype),
        )
    experts = compressed(module, terms)
    x, index, weights = inputs(experts)
    given = x.to(dtype), index, weights.to(dtype)
    expected = experts(*given)
    calls = []
    grouped = products.grouped_mm
    assert grouped is not None
    monkeypatch.setattr(products, "GROUPED_ON", {"cpu"})
    monkeypatch.setattr(
        products, "grouped_mm", lambda *a, **k: (calls.append(1), grouped(*a, **k))[1]
    )
    assert_equal(experts(*given), expected, 1e-6 if dtype == torch.float32 else 0.02)
    assert len(calls) == 6
    # A rank that is not aligned goes through the loop.
    odd = compressed(module, random_terms(module, "base and deltas", dtype))
    for part, bank in terms.items():
        assert odd.terms(part)[1].rank != bank[1].rank
    calls.clear()
    odd(*given)
    assert len(calls) == (6 if dtype == torch.float32 else 0)


def test_pairs_by_hand():
    choices = torch.tensor([[0, 2], [3, 1], [2, 0], [3, 3]])
    rows = Rows(choices, 4)
    assert rows.token.tolist() == [0, 2, 1, 0, 2, 1, 3, 3]
    assert [(s.expert, s.start, s.stop) for s in rows.segments] == [
        (0, 0, 2), (1, 2, 3), (2, 3, 5), (3, 5, 8)
    ]  # fmt: skip
    pairs = Pairs((0, 1, 0, None), rows)
    assert pairs.token.tolist() == [0, 2, 1]  # group 0: tokens 0 and 2; group 1: token 1
    values = torch.arange(8.0)[:, None]
    # Token 0: rows 0 and 3; token 2: rows 1 and 4; token 1: row 2 of expert 1; 3 has no group.
    weights = torch.tensor([[1.0, 10.0], [5.0, 2.0], [100.0, 1.0], [7.0, 7.0]])
    assert pairs.sum_rows(values, weights)[:, 0].tolist() == [30.0, 401.0, 4.0]
    spread = pairs.to_rows(torch.tensor([[1.0], [2.0], [3.0]]), rows)
    assert spread[:, 0].tolist() == [1.0, 2.0, 3.0, 1.0, 2.0, 0.0, 0.0, 0.0]
    assert pairs.to_tokens(torch.tensor([[1.0], [2.0], [3.0]]))[:, 0].tolist() == [
        1.0,
        3.0,
        2.0,
        0.0,
    ]


def test_shared_groups():
    assert shared_groups([0, 1, None]) is None
    assert shared_groups([None, None]) is None
    assert shared_groups([3, 1, 3, None]) == (0, 1, 0, None)


def test_a_forward_in_which_no_member_of_a_base_is_visited():
    module = original("mixtral")
    terms = random_terms(module, "two bases")
    experts = compressed(module, terms)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 0], [0, 0], [0, 0]])
    given = x, index, torch.full((3, 2), 0.5)
    assert_equal(experts(*given), plain(experts, *given))
